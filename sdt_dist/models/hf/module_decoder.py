"""The decoder for any causal language model: through the module itself, all rows of a problem in lockstep.

Generated tokens are fed again when a batch opens (no KV is handed on), so every row of a batch stands at the same
position and no architecture needs to know of ragged rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sdt_dist.models.decoder import Prompt

_ROW_MULTIPLE = 8


class ModuleDecoder:
    """Decoder over a Transformers module with a standard cache, on any device and in any dtype."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.device = next(module.parameters()).device

    @torch.inference_mode()
    def encode(self, prompt: Sequence[int]) -> Prompt:
        out = self.module(
            input_ids=torch.tensor([list(prompt)], device=self.device), use_cache=True
        )
        return Prompt(len(prompt), out.past_key_values, out.logits[0, -1].float().cpu().numpy())

    def open(
        self, prompts: Sequence[Prompt], known: Sequence[list[np.ndarray]], capacity: int
    ) -> ModuleBatch:
        return ModuleBatch(self, prompts)


class ModuleBatch:
    """One lockstep cache a problem, each with its rows padded to a multiple of 8."""

    def __init__(self, decoder: ModuleDecoder, prompts: Sequence[Prompt]) -> None:
        self._decoder = decoder
        members: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            members.setdefault(id(prompt.cache), []).append(row)
        self._groups = []
        for rows in members.values():
            cache = copy.deepcopy(prompts[rows[0]].cache)
            cache.batch_repeat_interleave(len(rows) + (-len(rows)) % _ROW_MULTIPLE)
            self._groups.append((rows, cache))

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        found: dict[int, torch.Tensor] = {}
        for rows, cache in self._groups:
            ids = [tokens[row] for row in rows]
            ids += [ids[0]] * (-len(ids) % _ROW_MULTIPLE)
            column = torch.tensor(ids, device=self._decoder.device)[:, None]
            with _PlainAttention() if self._decoder.device.type == "cpu" else nullcontext():
                logits = self._decoder.module(
                    input_ids=column, past_key_values=cache, use_cache=True
                ).logits[:, -1]
            found |= dict(zip(rows, logits.float().cpu(), strict=False))
        return torch.stack([found[row] for row in range(len(tokens))]).numpy()

    @property
    def calls_per_feed(self) -> int:
        return len(self._groups)

    def select(self, rows: Sequence[int]) -> None:
        place = {old: new for new, old in enumerate(rows)}
        groups = []
        for members, cache in self._groups:
            kept = [i for i, row in enumerate(members) if row in place]
            if kept:
                index = kept + [kept[0]] * (-len(kept) % _ROW_MULTIPLE)
                cache.batch_select_indices(torch.tensor(index, device=self._decoder.device))
                groups.append(([place[members[i]] for i in kept], cache))
        self._groups = groups

    def values(self, row: int) -> np.ndarray | None:
        return None


class _PlainAttention(TorchFunctionMode):
    """Attention by batched products, in this thread: torch's fused CPU kernel gives a row other bits in another place
    of its batch, as soon as it works with several threads.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        plain = _attention if func is functional.scaled_dot_product_attention else func
        return plain(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by its defining products; this kernel adds its mask, so True has to become 0."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
            ~attn_mask, -torch.inf
        )
    products = torch.ops.aten._scaled_dot_product_attention_math
    return products(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]
