"""Two units of states: what a tree's nodes are, and what the model generates.

See docs/architecture/search.md.

Methods, the loop and the tree speak of tree states: sequences of whatever one node adds. A model speaks of model states:
sequences of tokens. They are the same (`PlainStates`), or a node adds a block of tokens (`blocks`). A session translates
requests on their way to the model and replies on their way back; nobody else sees both units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sdt_dist.protocols import Decoded, FinishReason, ModelReply, ModelRequest, Root, States


class TreeStates(Protocol):
    """How tree states read, and how they are told to the model. `tokens` below are those of a tree state."""

    @property
    def max_new_tokens(self) -> int:
        """Depth of the deepest node."""
        ...

    @property
    def deterministic(self) -> bool: ...

    @property
    def top_k(self) -> int | None: ...

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """Model tokens of every block that is known, in the order of their ids; none where nodes add single tokens."""
        ...

    def is_finished(self, tokens: Sequence[int]) -> bool: ...

    def finish_reason(self, tokens: Sequence[int]) -> FinishReason: ...

    def decode(self, root: Root, sequences: Sequence[tuple[int, ...]]) -> list[Decoded]: ...

    def to_model(self, request: ModelRequest) -> ModelRequest:
        """A request about a tree state as one about the model's."""
        ...

    def to_tree(self, request: ModelRequest, reply: ModelReply) -> ModelReply:
        """The model's reply in the units of the tree; `request` is the one in tree states."""
        ...


class PlainStates:
    """Tree states that are the model's own: every node adds one token."""

    def __init__(self, states: States) -> None:
        self.states = states

    @property
    def max_new_tokens(self) -> int:
        return self.states.max_new_tokens

    @property
    def deterministic(self) -> bool:
        return self.states.deterministic

    @property
    def top_k(self) -> int | None:
        return self.states.top_k

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        return []

    def is_finished(self, tokens: Sequence[int]) -> bool:
        return self.states.is_finished(tokens)

    def finish_reason(self, tokens: Sequence[int]) -> FinishReason:
        return self.states.finish_reason(tokens)

    def decode(self, root: Root, sequences: Sequence[tuple[int, ...]]) -> list[Decoded]:
        return self.states.decode(root, sequences)

    def to_model(self, request: ModelRequest) -> ModelRequest:
        return request

    def to_tree(self, request: ModelRequest, reply: ModelReply) -> ModelReply:
        return reply


def model_tokens(tokens: Sequence[int], blocks: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The model tokens of a tree state; `blocks`: theirs by id, none where nodes add single tokens."""
    if not blocks:
        return tuple(tokens)
    return tuple(token for block in tokens for token in blocks[block])
