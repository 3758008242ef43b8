"""Trees whose nodes are blocks of tokens: branching only at some depths, children iid draws from p.

See docs/concepts/exactness.md, docs/concepts/target.md#methods.

A block is interned as an integer, so that the tree, the loop and the methods see an ordinary token tree. Block ids name
blocks within one search only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdt_dist.noise import position_key
from sdt_dist.protocols import Decoded, FinishReason, ModelReply, ModelRequest, Root, States
from sdt_dist.search.states import model_tokens


def block_ends(
    length: int, block_size: int | None, branch_depths: Sequence[int] | None
) -> list[int]:
    """Token depths at which blocks end, the last one `length`: multiples of block_size, or the branch depths."""
    inner = (
        range(block_size, length, block_size)
        if block_size is not None
        else sorted(set(branch_depths or ()))
    )
    return [end for end in inner if 0 < end < length] + [length]


class BlockStates:
    """Tree states that are sequences of block ids; `ends` are the token depths at which blocks end.

    known: the tokens of blocks that have ids already, as a saved search's nodes name them.
    """

    def __init__(
        self, states: States, ends: list[int], known: Sequence[tuple[int, ...]] = ()
    ) -> None:
        self.states = states
        self.ends = ends
        self.blocks: list[tuple[int, ...]] = list(known)
        self._ids = {block: i for i, block in enumerate(self.blocks)}

    @property
    def max_new_tokens(self) -> int:
        return len(self.ends)

    @property
    def deterministic(self) -> bool:
        return self.states.deterministic

    @property
    def top_k(self) -> int | None:
        return self.states.top_k

    def tokens(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The model tokens of a sequence of blocks."""
        return model_tokens(ids, self.blocks)

    def is_finished(self, tokens: Sequence[int]) -> bool:
        return self.states.is_finished(self.tokens(tokens))

    def finish_reason(self, tokens: Sequence[int]) -> FinishReason:
        return self.states.finish_reason(self.tokens(tokens))

    def decode(self, root: Root, sequences: Sequence[tuple[int, ...]]) -> list[Decoded]:
        return self.states.decode(root, [self.tokens(sequence) for sequence in sequences])

    def to_model(self, request: ModelRequest) -> ModelRequest:
        """A draw of blocks as one of tokens; the key of the first new position is that of its token."""
        assert request.kind == "rollout", "children that are blocks are drawn, never listed"
        depth = len(request.tokens)
        tokens = self.tokens(request.tokens)
        end = self.ends[depth + request.num_tokens - 1]
        key = None if request.key is None else position_key(request.key, len(tokens) - depth)
        return replace(request, tokens=tokens, num_tokens=end - len(tokens), key=key)

    def to_tree(self, request: ModelRequest, reply: ModelReply) -> ModelReply:
        """Drawn tokens as ids and log p of blocks. Outside a block there is always mass left."""
        assert request.kind == "rollout" and reply.kind == "rollout"
        depth = len(request.tokens)
        begin = len(self.tokens(request.tokens))
        lengths = [end - begin for end in self.ends[depth : depth + request.num_tokens]]
        stops = [length for length in lengths if length < len(reply.tokens)]
        pieces = np.split(reply.tokens, stops)
        log_prob = np.array([part.sum() for part in np.split(reply.log_prob, stops)])
        ids = np.array([self._intern(tuple(piece.tolist())) for piece in pieces], dtype=np.int32)
        with np.errstate(divide="ignore"):
            outside = np.log(-np.expm1(np.minimum(log_prob, 0.0)))
        return replace(
            reply,
            tokens=ids,
            log_prob=log_prob,
            log_residual=outside,
            num_remaining=np.ones(len(ids), dtype=np.int32),
        )

    def _intern(self, block: tuple[int, ...]) -> int:
        if block not in self._ids:
            self._ids[block] = len(self.blocks)
            self.blocks.append(block)
        return self._ids[block]
