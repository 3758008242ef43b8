"""A lean decoder for the Llama family: the module's own weights without the module's per-layer overhead.

A layer is four matrix products and compiled loops between them. Products take hidden states before their RMS norm: its
weight is folded into the matrices, its scale is one number a row and applied after. Attention runs over the keys of
the prompt, shared by all rows of a problem, and over each row's own, with one softmax. Rows are padded to multiples
of 8: from there on the CPU's matrix products give every row the same bits, and the loops always do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numba import njit
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sdt_dist.models.decoder import Prompt
from sdt_dist.models.reduction import exp_nonpositive

_ROW_MULTIPLE = 8
_UNROLL = 4  # head dimensions, and positions, taken together
# Sums in vector order. They stand in functions that write no array: beside a store the compiler would keep two orders,
# and choose by where the arrays lie in memory. Loops with stores may only fuse a*b + c, which has one meaning.
_REASSOCIATED = {"reassoc", "contract", "nsz"}


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATED)
def _rms_scale(x, epsilon):
    """1 / root mean square of one hidden state [hidden]."""
    total = np.float32(0.0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return np.float32(1.0 / math.sqrt(total / len(x) + epsilon))


@njit(cache=True, error_model="numpy")
def _rotate(x, heads, cos, sin, num_rotated, epsilon):
    """Scale the projections `heads` [B, H + 2 Hkv, D] of hidden states x [B, hidden] and turn the first, in place."""
    half = heads.shape[2] // 2
    for row in range(len(x)):
        scale = _rms_scale(x[row], epsilon)
        for head in range(heads.shape[1]):
            for d in range(half):
                left = heads[row, head, d] * scale
                right = heads[row, head, d + half] * scale
                if head < num_rotated:
                    heads[row, head, d] = left * cos[row, d] - right * sin[row, d]
                    heads[row, head, d + half] = (
                        right * cos[row, d + half] + left * sin[row, d + half]
                    )
                else:
                    heads[row, head, d], heads[row, head, d + half] = left, right


@njit(cache=True, error_model="numpy")
def _gate(x, gate_up, gated, epsilon):
    """silu(gate) * up [B, I] of the projections `gate_up` [B, 2 I] of hidden states x [B, hidden]."""
    width = gated.shape[1]
    for row in range(len(x)):
        scale = _rms_scale(x[row], epsilon)
        for i in range(width):
            gate = np.float64(gate_up[row, i] * scale)
            small = exp_nonpositive(-abs(gate))
            share = (1.0 if gate >= 0.0 else small) / (1.0 + small)
            gated[row, i] = np.float32(gate * share) * (gate_up[row, width + i] * scale)


@njit(cache=True, error_model="numpy")
def _attend(heads, rows, slots, keys, values, own, lengths, output):
    """Attention of `rows` of one prompt: their keys and values join `own`, the result goes to output [B, H, D].

    heads [B, H + 2 Hkv, D] are scaled queries, keys and values; keys [Hkv, D, L] and values [Hkv, L, D] the prompt's;
    own [2, slots, Hkv, S, D] the rows' own in their slots, of which `lengths` count the token just fed. Queries go in
    pairs, so that the prompt is read half as often; an odd last one is its own partner.
    """
    num_kv, dim, length = keys.shape
    num_heads = heads.shape[1] - 2 * num_kv
    repeat = num_heads // num_kv
    num_queries = len(rows) * repeat
    query = np.empty((2, dim), np.float32)
    mixed = np.empty((2, dim), np.float32)
    scores = np.empty((2, length + own.shape[3]), np.float32)
    for kv in range(num_kv):
        for place in range(len(rows)):
            slot = slots[place]
            row = rows[place]
            own[0, slot, kv, lengths[slot] - 1] = heads[row, num_heads + kv]
            own[1, slot, kv, lengths[slot] - 1] = heads[row, num_heads + num_kv + kv]
        for first in range(0, num_queries, 2):
            for i in range(2):
                number = min(first + i, num_queries - 1)
                query[i] = heads[rows[number // repeat], kv * repeat + number % repeat]
            _pair_scores(query, keys[kv], scores)
            mixed[:] = 0.0
            for i in range(2):
                slot = slots[min(first + i, num_queries - 1) // repeat]
                _own_scores(query[i], own[0, slot, kv], scores[i, length : length + lengths[slot]])
                _softmax(scores[i, : length + lengths[slot]])
            _pair_mix(scores, values[kv], mixed)
            for i in range(2):
                number = min(first + i, num_queries - 1)
                slot = slots[number // repeat]
                _own_mix(scores[i, length : length + lengths[slot]], own[1, slot, kv], mixed[i])
                output[rows[number // repeat], kv * repeat + number % repeat] = mixed[i]


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _pair_scores(query, keys, scores):
    """Write query [2, D] @ keys [D, L] to the first L columns of scores; both rows sum over d in order."""
    one = scores[0]
    two = scores[1]
    scores[:, : keys.shape[1]] = 0.0
    for d in range(0, len(keys), _UNROLL):
        a0 = query[0, d]
        a1 = query[0, d + 1]
        a2 = query[0, d + 2]
        a3 = query[0, d + 3]
        b0 = query[1, d]
        b1 = query[1, d + 1]
        b2 = query[1, d + 2]
        b3 = query[1, d + 3]
        k0 = keys[d]
        k1 = keys[d + 1]
        k2 = keys[d + 2]
        k3 = keys[d + 3]
        for p in range(keys.shape[1]):
            one[p] = one[p] + a0 * k0[p] + a1 * k1[p] + a2 * k2[p] + a3 * k3[p]
            two[p] = two[p] + b0 * k0[p] + b1 * k1[p] + b2 * k2[p] + b3 * k3[p]


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _pair_mix(weights, values, mixed):
    """Add weights [2, L] @ values [L, D] to mixed [2, D]; both rows sum over positions in order."""
    one = mixed[0]
    two = mixed[1]
    whole = len(values) // _UNROLL * _UNROLL
    for p in range(0, whole, _UNROLL):
        a0 = weights[0, p]
        a1 = weights[0, p + 1]
        a2 = weights[0, p + 2]
        a3 = weights[0, p + 3]
        b0 = weights[1, p]
        b1 = weights[1, p + 1]
        b2 = weights[1, p + 2]
        b3 = weights[1, p + 3]
        v0 = values[p]
        v1 = values[p + 1]
        v2 = values[p + 2]
        v3 = values[p + 3]
        for d in range(len(one)):
            one[d] = one[d] + a0 * v0[d] + a1 * v1[d] + a2 * v2[d] + a3 * v3[d]
            two[d] = two[d] + b0 * v0[d] + b1 * v1[d] + b2 * v2[d] + b3 * v3[d]
    for p in range(whole, len(values)):
        a0 = weights[0, p]
        b0 = weights[1, p]
        v0 = values[p]
        for d in range(len(one)):
            one[d] += a0 * v0[d]
            two[d] += b0 * v0[d]


@njit(cache=True, fastmath=_REASSOCIATED)
def _dot(left, right):
    total = np.float32(0.0)
    for d in range(len(left)):
        total += left[d] * right[d]
    return total


@njit(cache=True)
def _own_scores(query, keys, scores):
    """Write query [D] . keys [n, D] to scores [n]."""
    for p in range(len(scores)):
        scores[p] = _dot(query, keys[p])


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _own_mix(weights, values, mixed):
    """Add weights [n] @ values [n, D] to mixed [D]."""
    for p in range(len(weights)):
        weight = weights[p]
        for d in range(len(mixed)):
            mixed[d] += weight * values[p, d]


@njit(cache=True, error_model="numpy")
def _softmax(scores):
    """Turn scores [n] into their softmax."""
    top = _largest(scores)
    for p in range(len(scores)):
        scores[p] = np.float32(exp_nonpositive(np.float64(scores[p] - top)))
    total = _sum(scores)
    for p in range(len(scores)):
        scores[p] /= total


@njit(cache=True, fastmath={"nnan", "nsz"})
def _largest(scores):
    """The maximum of scores [n]; no-NaN lets it vectorise (a NaN is no index, and spoils its row in any case)."""
    top = scores[0]
    for p in range(len(scores)):
        top = max(top, scores[p])
    return top


@njit(cache=True, fastmath=_REASSOCIATED)
def _sum(scores):
    total = np.float32(0.0)
    for p in range(len(scores)):
        total += scores[p]
    return total


class LlamaDecoder:
    """Decoder over a LlamaForCausalLM on the CPU, float32."""

    def __init__(self, module: LlamaForCausalLM) -> None:
        config = module.config
        self.device = torch.device("cpu")
        self.module = module
        self.num_layers = config.num_hidden_layers
        self.num_heads = int(config.num_attention_heads)
        self.num_kv = int(config.num_key_value_heads or config.num_attention_heads)
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.epsilon = config.rms_norm_eps
        self.embedding = module.model.embed_tokens.weight.detach()
        self.final_norm = module.model.norm.weight.detach()
        self.head = module.lm_head.weight.detach()
        layers = [cast(LlamaDecoderLayer, layer) for layer in module.model.layers]
        self.layers = [_LayerWeights(layer, self.head_dim) for layer in layers]
        positions = torch.arange(config.max_position_embeddings)[None]
        cos, sin = module.model.rotary_emb(torch.zeros(1, 1, 1), positions)
        self.cos = cos[0].detach().numpy()
        self.sin = sin[0].detach().numpy()

    @staticmethod
    def supports(module: torch.nn.Module) -> bool:
        """Plain Llama on the CPU in float32; everything else goes through the module itself."""
        if type(module) is not LlamaForCausalLM or next(module.parameters()).device.type != "cpu":
            return False
        config = module.config
        plain = config.hidden_act == "silu" and not config.attention_bias and not config.mlp_bias
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        return (
            plain
            and head_dim % _UNROLL == 0
            and all(p.dtype == torch.float32 for p in module.parameters())
        )

    @torch.inference_mode()
    def encode(self, prompt: Sequence[int]) -> Prompt:
        """Run one prompt by itself, so that its bits depend on nothing else."""
        ids = torch.tensor(prompt)
        length = len(ids)
        padded = functional.pad(ids, (0, -length % _ROW_MULTIPLE))
        x = self.embedding[padded]
        cos = self.cos[: len(padded)]
        sin = self.sin[: len(padded)]
        caches = []
        for layer in self.layers:
            heads = self._project(layer, x, cos, sin).transpose(0, 1)
            query = heads[: self.num_heads]
            key = heads[self.num_heads : -self.num_kv]
            value = heads[-self.num_kv :]
            attended = functional.scaled_dot_product_attention(
                query[None],
                key[None],
                value[None],
                is_causal=True,
                scale=1.0,
                enable_gqa=self.num_kv != self.num_heads,
            )
            x = self._finish(layer, x, attended[0].transpose(0, 1).reshape(len(padded), -1))
            key = key[:, :length].transpose(1, 2)
            value = value[:, :length]
            caches.append((key.contiguous().numpy(), value.contiguous().numpy()))
        last = x[length - 1 : length].expand(_ROW_MULTIPLE, -1)
        return Prompt(length, caches, self._logits(last)[0].clone().numpy())

    def open(
        self, prompts: Sequence[Prompt], known: Sequence[list[np.ndarray]], capacity: int
    ) -> LlamaBatch:
        return LlamaBatch(self, prompts, known, capacity)

    def _project(
        self, layer: _LayerWeights, x: torch.Tensor, cos: np.ndarray, sin: np.ndarray
    ) -> torch.Tensor:
        """Rotated and scaled queries, rotated keys, and values [B, H + 2 Hkv, D] of hidden states [B, hidden]."""
        heads = functional.linear(x, layer.qkv).view(
            len(x), self.num_heads + 2 * self.num_kv, self.head_dim
        )
        _rotate(x.numpy(), heads.numpy(), cos, sin, self.num_heads + self.num_kv, self.epsilon)
        return heads

    def _finish(
        self, layer: _LayerWeights, x: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        """Output projection, residuals and the gated MLP."""
        x = torch.addmm(x, attended, layer.out)
        gate_up = functional.linear(x, layer.gate_up)
        gated = torch.empty(len(x), gate_up.shape[1] // 2)
        _gate(x.numpy(), gate_up.numpy(), gated.numpy(), self.epsilon)
        return torch.addmm(x, gated, layer.down)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(
            functional.rms_norm(x, x.shape[-1:], self.final_norm, self.epsilon), self.head
        )


class _LayerWeights:
    """One layer's weights: query, key, value and gate, up fused, norms and the queries' 1/sqrt(D) folded in."""

    def __init__(self, layer: LlamaDecoderLayer, head_dim: int) -> None:
        attention = layer.self_attn
        mlp = layer.mlp
        parts = (
            attention.q_proj.weight / math.sqrt(head_dim),
            attention.k_proj.weight,
            attention.v_proj.weight,
        )
        self.qkv = (torch.cat(parts) * layer.input_layernorm.weight).detach()
        self.out = attention.o_proj.weight.detach().t()
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.gate_up = (gate_up * layer.post_attention_layernorm.weight).detach()
        self.down = mlp.down_proj.weight.detach().t()


class LlamaBatch:
    """Rows under way; a row keeps one slot of the own keys and values [layers, 2, slots, Hkv, S, D] to its end."""

    calls_per_feed = 1

    def __init__(
        self,
        decoder: LlamaDecoder,
        prompts: Sequence[Prompt],
        known: Sequence[list[np.ndarray]],
        capacity: int,
    ) -> None:
        self._decoder = decoder
        self._prompts = list(prompts)
        self._slots = np.arange(len(prompts))
        shape = (decoder.num_layers, 2, len(prompts), decoder.num_kv, capacity, decoder.head_dim)
        self._own = torch.empty(shape).numpy()  # torch aligns it
        self._lengths = np.zeros(len(prompts), dtype=np.int64)
        for row, pieces in enumerate(known):
            for piece in pieces:
                first = int(self._lengths[row])
                count = piece.shape[3]
                self._own[:, :, row, :, first : first + count] = piece
                self._lengths[row] += count
        self._group()

    def _group(self) -> None:
        """Rows of one prompt attend together; padding rows belong to none."""
        members: dict[int, list[int]] = {}
        for row, prompt in enumerate(self._prompts):
            members.setdefault(id(prompt.cache), []).append(row)
        self._groups = [
            (np.array(rows), self._slots[rows], self._prompts[rows[0]].cache)
            for rows in members.values()
        ]
        self._padding = [0] * (-len(self._prompts) % _ROW_MULTIPLE)
        self._starts = np.array([*(prompt.length for prompt in self._prompts), *self._padding])

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        decoder = self._decoder
        own = self._own
        x = decoder.embedding[torch.tensor([*tokens, *self._padding])]
        positions = self._starts.copy()
        positions[: len(tokens)] += self._lengths[self._slots]
        cos = decoder.cos[positions]
        sin = decoder.sin[positions]
        self._lengths[self._slots] += 1
        attended = torch.zeros(len(x), decoder.num_heads * decoder.head_dim)
        output = attended.view(len(x), decoder.num_heads, decoder.head_dim).numpy()
        for number, layer in enumerate(decoder.layers):
            heads = decoder._project(layer, x, cos, sin).numpy()
            for rows, slots, cache in self._groups:
                keys, values = cache[number]
                _attend(heads, rows, slots, keys, values, own[number], self._lengths, output)
            x = decoder._finish(layer, x, attended)
        return decoder._logits(x)[: len(tokens)].numpy()

    def select(self, rows: Sequence[int]) -> None:
        self._prompts = [self._prompts[row] for row in rows]
        self._slots = self._slots[list(rows)]
        self._group()

    def values(self, row: int) -> np.ndarray | None:
        slot = self._slots[row]
        return self._own[:, :, slot, :, : int(self._lengths[slot])]
