"""`MlxModel`: a LogitsModel over an mlx-lm model, on Apple Silicon or an ordinary CPU.

See docs/architecture/search.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from sdt_dist.models.cached_model import CachedModel
from sdt_dist.models.mlx.decoder import MlxDecoder

_CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
)
_NO_LIMIT = 1 << 30


class MlxModel(CachedModel):
    """A module of mlx-lm and its configuration (config.json); only seeds are promised, not bits.

    max_context is taken from the configuration; architectures without positions have no limit. Where a sliding window
    is configured and mlx-lm keeps plain caches in all layers (it may then attend to everything, without a word), the
    window is the limit: up to there both are the same.
    """

    def __init__(
        self,
        module: nn.Module,
        config: dict[str, Any],
        *,
        max_context: int | None = None,
        cache_bytes: int = 2 << 30,
    ) -> None:
        decoder = MlxDecoder(module)
        self.module = module
        self.config = config
        super().__init__(
            decoder,
            vocab_size=decoder.vocab_size,
            max_context=int(max_context or _max_context(config, windows=not decoder.hands_on)),
            deterministic=False,
            cache_bytes=cache_bytes,
        )

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """What ends a sequence by the model's own configuration."""
        return self.config.get("eos_token_id")

    def reference_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [V] float32 after a sequence, by the module itself and without caches."""
        return np.array(cast(Any, self.module)(mx.array([list(tokens)]))[0, -1].astype(mx.float32))

    def config_values(self) -> dict[str, Any]:
        """The configuration as it was loaded."""
        return self.config

    def named_weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Label and bytes [n] uint8 of every weight, in order (numpy has no bfloat16)."""
        for label, weight in sorted(
            cast(list[tuple[str, mx.array]], tree_flatten(self.module.parameters()))
        ):
            yield (
                f"{label}:{weight.dtype}:{weight.shape}",
                np.array(weight.reshape(-1).view(mx.uint8)),
            )


def _max_context(config: dict[str, Any], *, windows: bool) -> int:
    """Positions that a model was made for; composite models have them with their text part.

    windows: whether the module has sliding windows of its own.
    """
    for part in (config, config.get("text_config") or {}):
        for name in _CONTEXT_FIELDS:
            if part.get(name):
                window = (
                    part.get("sliding_window")
                    if part.get("use_sliding_window", True) and not windows
                    else None
                )
                return int(min(part[name], window or part[name]))
    return _NO_LIMIT
