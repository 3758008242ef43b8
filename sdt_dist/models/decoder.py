"""What a decoder is: it encodes prompts once and feeds one token a row and step (the seam of `CachedModel`).

Logits and keys and values cross it as numpy arrays, so that the model above knows no tensor library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded prompt: its length, the decoder's own cache of it, and the logits [V] of its last position."""

    length: int
    cache: Any
    logits: np.ndarray


class Batch(Protocol):
    """Rows under way; `calls_per_feed` is how many forward passes one `feed` takes."""

    @property
    def calls_per_feed(self) -> int: ...

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Feed one token a row; logits [B, V] float32 of the next position."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        ...

    def values(self, row: int) -> np.ndarray | None:
        """KV [layers, 2, heads, n, head_dim] of a row's fed tokens, or None where it cannot be handed on.

        The cache takes it as bytes to give back to `open`; a decoder may store types that numpy lacks as others.
        """
        ...


class Decoder(Protocol):
    """Encodes prompts and opens batches; on the CPU a row's bits do not depend on the rows beside it."""

    def encode(self, prompt: Sequence[int]) -> Prompt: ...

    def open(
        self, prompts: Sequence[Prompt], known: Sequence[list[np.ndarray]], capacity: int
    ) -> Batch:
        """Rows that continue `prompts`, starting from `known` KV pieces, with room for `capacity` tokens each."""
        ...
