"""A lean decoder for the Llama family: the module's own weights without the module's per-layer overhead.

Attention has two parts with one softmax: the prompt's keys, shared by all rows of a problem (one matrix product a
problem), and each row's own generated keys (compiled loop over its true length). Rows are padded to multiples of 8
and a problem's rows to multiples of 4: from there on the CPU's matrix products give every row the same bits.
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

from sdt_dist.models.hf.decoder import Prompt

_ROW_MULTIPLE, _GROUP_MULTIPLE = 8, 4
_PROMPT_MULTIPLE = 16  # smaller products take another kernel, whose bits differ with the batch


@njit(cache=True, fastmath=False)
def _merge_suffix(query, keys, values, lengths, top, total, output):
    """Finish softmax attention over each row's own keys, in place of `output` [B, H, D] (the prompt's part).

    query [B, H, D] is scaled; keys, values [B, Hkv, S, D]; lengths [B] include the token just fed. top, total
    [B, H] are the prompt part's maximum and sum of exponentials.
    """
    num_rows, num_heads, dim = query.shape
    repeat = num_heads // keys.shape[1]
    scores = np.empty(keys.shape[2], dtype=np.float32)
    for row in range(num_rows):
        for head in range(num_heads):
            kv = head // repeat
            largest = top[row, head]
            for position in range(lengths[row]):
                score = np.float32(0.0)
                for d in range(dim):
                    score += query[row, head, d] * keys[row, kv, position, d]
                scores[position] = score
                largest = max(largest, score)
            shrink = np.exp(top[row, head] - largest)
            weight = total[row, head] * shrink
            for d in range(dim):
                output[row, head, d] *= shrink
            for position in range(lengths[row]):
                share = np.exp(scores[position] - largest)
                weight += share
                for d in range(dim):
                    output[row, head, d] += share * values[row, kv, position, d]
            for d in range(dim):
                output[row, head, d] /= weight


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
        self.final_norm, self.head = module.model.norm.weight.detach(), module.lm_head.weight.detach()
        self.layers = [_LayerWeights(cast(LlamaDecoderLayer, layer)) for layer in module.model.layers]
        positions = torch.arange(config.max_position_embeddings)[None]
        cos, sin = module.model.rotary_emb(torch.zeros(1, 1, 1), positions)
        self.cos, self.sin = cos[0].detach(), sin[0].detach()

    @staticmethod
    def supports(module: torch.nn.Module) -> bool:
        """Plain Llama on the CPU in float32; everything else goes through the module itself."""
        if type(module) is not LlamaForCausalLM or next(module.parameters()).device.type != "cpu":
            return False
        config = module.config
        plain = config.hidden_act == "silu" and not config.attention_bias and not config.mlp_bias
        return plain and all(p.dtype == torch.float32 for p in module.parameters())

    @torch.inference_mode()
    def encode(self, prompt: Sequence[int]) -> Prompt:
        """Run one prompt by itself, so that its bits depend on nothing else."""
        ids = torch.tensor(prompt)
        length = len(ids)
        padded = functional.pad(ids, (0, -length % _ROW_MULTIPLE))
        x = self.embedding[padded]
        cos, sin = self._rotary(torch.arange(len(padded)))
        caches = []
        for layer in self.layers:
            query, key, value = self._project(layer, x, cos, sin)
            attended = functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=self.num_kv != self.num_heads,
            )
            x = self._finish(layer, x, attended[0].transpose(0, 1).reshape(len(padded), -1))
            caches.append((_padded(key[:length]), _padded(value[:length])))
        last = x[length - 1 : length].expand(_ROW_MULTIPLE, -1)
        return Prompt(length, caches, self._logits(last)[0].clone())

    def open(self, prompts: Sequence[Prompt], known: Sequence[list[torch.Tensor]], capacity: int) -> LlamaBatch:
        return LlamaBatch(self, prompts, known, capacity)

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def _project(
        self, layer: _LayerWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated query [B, H, D] and key, and value [B, Hkv, D] of hidden states [B, hidden]."""
        normed = functional.rms_norm(x, x.shape[-1:], layer.norm_1, self.epsilon)
        heads = functional.linear(normed, layer.qkv).view(len(x), self.num_heads + 2 * self.num_kv, self.head_dim)
        rotated = heads[:, : self.num_heads + self.num_kv]
        half = self.head_dim // 2
        turned = torch.cat((-rotated[..., half:], rotated[..., :half]), dim=-1)
        rotated = rotated * cos + turned * sin
        return rotated[:, : self.num_heads], rotated[:, self.num_heads :], heads[:, self.num_heads + self.num_kv :]

    def _finish(self, layer: _LayerWeights, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residuals and the gated MLP."""
        x = x + functional.linear(attended, layer.out)
        normed = functional.rms_norm(x, x.shape[-1:], layer.norm_2, self.epsilon)
        gate, up = functional.linear(normed, layer.gate_up).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, layer.down)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.rms_norm(x, x.shape[-1:], self.final_norm, self.epsilon), self.head)


class _LayerWeights:
    """One layer's weights with query, key, value and gate, up fused."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        parts = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self.qkv = torch.cat([part.detach() for part in parts])
        self.out = attention.o_proj.weight.detach()
        self.gate_up = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
        self.down = mlp.down_proj.weight.detach()
        self.norm_1 = layer.input_layernorm.weight.detach()
        self.norm_2 = layer.post_attention_layernorm.weight.detach()


class LlamaBatch:
    """Rows under way: keys and values [layers][B, Hkv, S, D] of their own tokens, and their prompts by length."""

    calls_per_feed = 1

    def __init__(
        self, decoder: LlamaDecoder, prompts: Sequence[Prompt], known: Sequence[list[torch.Tensor]], capacity: int
    ) -> None:
        self._decoder = decoder
        self._prompts = list(prompts)
        padded = len(prompts) + (-len(prompts)) % _ROW_MULTIPLE
        shape = (decoder.num_layers, 2, padded, decoder.num_kv, capacity, decoder.head_dim)
        self._own = torch.zeros(shape)
        self._lengths = np.zeros(padded, dtype=np.int64)
        for row, pieces in enumerate(known):
            for piece in pieces:
                first, count = int(self._lengths[row]), piece.shape[3]
                self._own[:, :, row, :, first : first + count] = piece
                self._lengths[row] += count
        self._group()

    def _group(self) -> None:
        """Order rows by prompt: groups of equal prompt length share one batched product."""
        by_length: dict[int, dict[int, list[int]]] = {}
        for row, prompt in enumerate(self._prompts):
            by_length.setdefault(prompt.length, {}).setdefault(id(prompt.cache), []).append(row)
        self._groups = [_Group(self._decoder, self._prompts, list(rows.values())) for rows in by_length.values()]
        padding = len(self._lengths) - len(self._prompts)
        starts = [prompt.length for prompt in self._prompts] + [0] * padding
        self._starts = torch.tensor(starts)

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        decoder, count = self._decoder, len(self._prompts)
        padded = len(self._lengths)
        ids = torch.zeros(padded, dtype=torch.int64)
        ids[:count] = torch.as_tensor(tokens)
        offsets = torch.from_numpy(self._lengths.copy())
        cos, sin = decoder._rotary(self._starts + offsets)
        rows = torch.arange(padded)
        self._lengths[:count] += 1
        x = decoder.embedding[ids]
        for number, layer in enumerate(decoder.layers):
            query, key, value = decoder._project(layer, x, cos, sin)
            self._own[number, 0][rows, :, offsets] = key
            self._own[number, 1][rows, :, offsets] = value
            attended = self._attend(number, query / math.sqrt(decoder.head_dim))
            x = decoder._finish(layer, x, attended.view(padded, -1))
        return decoder._logits(x)[:count]

    def _attend(self, number: int, query: torch.Tensor) -> torch.Tensor:
        padded, heads, dim = query.shape
        output = torch.zeros(padded, heads, dim)
        top, total = torch.zeros(padded, heads), torch.ones(padded, heads)
        for group in self._groups:
            group.attend(number, query, top, total, output)
        own = self._own[number].numpy()
        _merge_suffix(
            query.contiguous().numpy(), own[0], own[1], self._lengths, top.numpy(), total.numpy(), output.numpy()
        )
        return output

    def select(self, rows: Sequence[int]) -> None:
        self._prompts = [self._prompts[row] for row in rows]
        padded = len(rows) + (-len(rows)) % _ROW_MULTIPLE
        own = torch.zeros((*self._own.shape[:2], padded, *self._own.shape[3:]))
        own[:, :, : len(rows)] = self._own[:, :, list(rows)]
        lengths = np.zeros(padded, dtype=np.int64)
        lengths[: len(rows)] = self._lengths[list(rows)]
        self._own, self._lengths = own, lengths
        self._group()

    def values(self, row: int) -> torch.Tensor | None:
        return self._own[:, :, row, :, : int(self._lengths[row])]


class _Group:
    """Rows whose prompts have one length: their prompts' keys stacked [G, Hkv, L, D], and where rows stand."""

    def __init__(self, decoder: LlamaDecoder, prompts: list[Prompt], rows: list[list[int]]) -> None:
        width = max(len(members) for members in rows)
        width += -width % _GROUP_MULTIPLE
        self._index = torch.tensor([members + [members[0]] * (width - len(members)) for members in rows])
        self._rows = torch.tensor([row for members in rows for row in members])
        self._slots = torch.tensor([g * width + i for g, members in enumerate(rows) for i in range(len(members))])
        caches = [prompts[members[0]].cache for members in rows]
        self._keys = [_stack([cache[n][0] for cache in caches]).transpose(2, 3) for n in range(decoder.num_layers)]
        self._values = [_stack([cache[n][1] for cache in caches]) for n in range(decoder.num_layers)]
        self._num_kv, self._length = decoder.num_kv, prompts[rows[0][0]].length

    def attend(
        self, number: int, query: torch.Tensor, top: torch.Tensor, total: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Write the prompt's part of the attention of this group's rows: maximum, sum and weighted values."""
        groups, width = self._index.shape
        _, heads, dim = query.shape
        repeat = heads // self._num_kv
        spread = query[self._index].view(groups, width, self._num_kv, repeat, dim).permute(0, 2, 3, 1, 4)
        scores = spread.reshape(groups, self._num_kv, repeat * width, dim) @ self._keys[number]
        scores[..., self._length :] = -torch.inf
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp_(scores.sub_(largest))
        sums = weights.sum(-1)
        attended = (weights @ self._values[number]).view(groups, heads, width, dim).transpose(1, 2)
        output[self._rows] = attended.reshape(groups * width, heads, dim)[self._slots]
        for target, found in ((top, largest), (total, sums)):
            by_row = found.view(groups, heads, width).transpose(1, 2).reshape(groups * width, heads)
            target[self._rows] = by_row[self._slots]


def _padded(heads: torch.Tensor) -> torch.Tensor:
    """[L, Hkv, D] to [Hkv, L padded, D] contiguous."""
    filled = functional.pad(heads, (0, 0, 0, 0, 0, -len(heads) % _PROMPT_MULTIPLE))
    return filled.transpose(0, 1).contiguous()


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
