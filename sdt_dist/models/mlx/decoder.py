"""The decoder for mlx-lm's modules: rows of many prompts and depths in one padded batch.

See docs/architecture/search.md.

A batch is mlx-lm's own batched cache, so any architecture that mlx-lm can batch is decoded here. Where all layers have
plain key-value caches, generated positions are handed on to later batches; elsewhere they are fed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.decoder import Prompt

_PIECE_TOKENS = 512  # of a long prompt that run at a time, and whose logits exist at most
_STORAGE = {mx.bfloat16: mx.uint16}  # numpy lacks bfloat16: its bits are kept


class MlxDecoder:
    """Decoder over an mlx-lm module, in the module's own dtype.

    ConfigurationError for an architecture whose caches mlx-lm cannot batch.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        caches = make_prompt_cache(module)
        lacking = [type(cache).__name__ for cache in caches if not hasattr(cache, "merge")]
        if lacking:
            raise ConfigurationError(
                f"model: mlx-lm cannot batch its {lacking[0]}; use hf: (Transformers) instead."
            )
        # lazy: its shape and types are read, nothing is computed
        logits = self.run(mx.array([[0]]), caches)
        self.vocab_size = int(logits.shape[-1])
        plain = all(type(cache) is KVCache for cache in caches)
        forms = (
            {(kv.shape, kv.dtype) for cache in caches for kv in cache.keys_and_values()}
            if plain
            else set()
        )
        self.hands_on = len(forms) == 1  # keys and values of all layers fit into one array
        self.dtype = forms.pop()[1] if self.hands_on else None

    def run(self, ids: mx.array, caches: list[Any]) -> mx.array:
        """Logits [B, n, V] of tokens [B, n] that continue what `caches` hold, which then hold these too."""
        return cast(Any, self.module)(ids, cache=caches)

    def encode(self, prompt: Sequence[int]) -> Prompt:
        """Run one prompt; a long one goes in pieces, so that logits of all its positions never exist at once."""
        caches = make_prompt_cache(self.module)
        ids = mx.array([list(prompt)])
        last = (len(prompt) - 1) // _PIECE_TOKENS * _PIECE_TOKENS
        for first in range(0, last, _PIECE_TOKENS):
            self.run(ids[:, first : first + _PIECE_TOKENS], caches)
            mx.eval([cache.state for cache in caches])
        logits = self.run(ids[:, last:], caches)[0, -1].astype(mx.float32)
        kept = (
            mx.stack([mx.concatenate(cache.keys_and_values()) for cache in caches])
            if self.hands_on
            else caches
        )
        mx.eval(logits, kept if self.hands_on else [cache.state for cache in caches])
        return Prompt(len(prompt), kept, np.array(logits))

    def open(
        self, prompts: Sequence[Prompt], known: Sequence[list[np.ndarray]], capacity: int
    ) -> MlxBatch:
        lengths = [sum(piece.shape[3] for piece in pieces) for pieces in known]
        if not self.hands_on:
            caches = [
                layer[0].merge(list(layer))
                for layer in zip(*(prompt.cache for prompt in prompts), strict=True)
            ]
            return MlxBatch(self, caches, lengths)
        ends = [prompt.length + length for prompt, length in zip(prompts, lengths, strict=True)]
        longest = max(ends)
        rows = [
            self._row(prompt, pieces, (longest - end, capacity))
            for prompt, pieces, end in zip(prompts, known, ends, strict=True)
        ]
        padding = mx.array([longest - end for end in ends])
        offsets = mx.array(ends)
        layers = mx.stack(rows, axis=2)
        caches = [
            BatchKVCache.from_state((kv[0], kv[1], offsets, padding, longest)) for kv in layers
        ]
        return MlxBatch(self, caches, lengths)

    def _row(self, prompt: Prompt, pieces: list[np.ndarray], margins: tuple[int, int]) -> mx.array:
        """KV [layers, 2, heads, S, head_dim] of a prompt and what follows it, with empty margins around."""
        parts = [
            prompt.cache,
            *(mx.array(piece).view(cast(mx.Dtype, self.dtype)) for piece in pieces),
        ]
        return mx.pad(mx.concatenate(parts, axis=3), [(0, 0), (0, 0), (0, 0), margins, (0, 0)])


class MlxBatch:
    """Rows under way in one batched cache a layer, left-padded to one length; `lengths` counts what is not prompt."""

    calls_per_feed = 1

    def __init__(self, decoder: MlxDecoder, caches: list[Any], lengths: list[int]) -> None:
        self._decoder = decoder
        self._caches = caches
        self._lengths = lengths

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        logits = self._decoder.run(mx.array(list(tokens))[:, None], self._caches)[:, -1]
        self._lengths = [length + 1 for length in self._lengths]
        return np.array(logits.astype(mx.float32))

    def select(self, rows: Sequence[int]) -> None:
        for cache in self._caches:
            cache.filter(mx.array(list(rows)))
        self._lengths = [self._lengths[row] for row in rows]

    def values(self, row: int) -> np.ndarray | None:
        dtype = self._decoder.dtype
        if dtype is None:
            return None
        both = [cache.keys_and_values() for cache in self._caches]
        first = both[0][0].shape[2] - self._lengths[row]
        own = mx.stack([mx.stack([kv[row, :, first:] for kv in layer]) for layer in both])
        return np.array(own.view(cast(mx.Dtype, _STORAGE.get(dtype, dtype))))
