"""What a decoder is: it encodes prompts once and feeds one token a row and step (the seam inside the hf backend)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded prompt: its length, the decoder's own cache of it, and the logits [V] of its last position."""

    length: int
    cache: Any
    logits: torch.Tensor


class Batch(Protocol):
    """Rows under way; `calls_per_feed` is how many forward passes one `feed` takes."""

    @property
    def calls_per_feed(self) -> int: ...

    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed one token a row; logits [B, V] float32 of the next position."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        ...

    def values(self, row: int) -> torch.Tensor | None:
        """KV [layers, 2, heads, n, head_dim] of a row's fed tokens, or None where it cannot be handed on."""
        ...


class Decoder(Protocol):
    """Encodes prompts and opens batches; on the CPU a row's bits do not depend on the rows beside it."""

    device: torch.device

    def encode(self, prompt: Sequence[int]) -> Prompt: ...

    def open(self, prompts: Sequence[Prompt], known: Sequence[list[torch.Tensor]], capacity: int) -> Batch:
        """Rows that continue `prompts`, starting from `known` KV pieces, with room for `capacity` tokens each."""
        ...
