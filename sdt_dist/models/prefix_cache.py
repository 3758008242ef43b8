"""Keys and values of generated tokens, shared by all states of a tree, within a byte budget.

See docs/architecture/search.md.

Each decoded row leaves one segment: the KV of the positions that it computed. A prefix is found position by
position through rolling hashes, across the segments of several rows. The least recently used segments go first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from sdt_dist.protocols import Root


@dataclass(slots=True)
class Segment:
    """KV [layers, 2, heads, n, head_dim] of n consecutive positions of one generated sequence."""

    keys: list[int]
    values: np.ndarray
    digest: bytes


def rolling_hashes(digest: bytes, tokens: tuple[int, ...]) -> list[int]:
    """One in-process hash per non-empty prefix of `tokens`."""
    found = []
    state = hash(digest)
    for token in tokens:
        state = hash((state, token))
        found.append(state)
    return found


class PrefixCache:
    """Segments by rolling hash, least recently used first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.size_bytes = 0
        self._segments: OrderedDict[int, Segment] = OrderedDict()
        self._places: dict[
            int, tuple[int, int]
        ] = {}  # hash of a prefix -> (segment, offset of its last position)
        self._of_root: dict[bytes, set[int]] = {}
        self._next = 0

    def find(self, digest: bytes, tokens: tuple[int, ...]) -> list[np.ndarray]:
        """KV pieces of the longest cached prefix of `tokens`, in order; each [layers, 2, heads, n, head_dim]."""
        pieces: list[np.ndarray] = []
        run: tuple[int, int, int] | None = None  # segment, first offset, end offset
        for key in rolling_hashes(digest, tokens):
            place = self._places.get(key)
            if place is None:
                break
            number, offset = place
            if run is not None and run[0] == number and run[2] == offset:
                run = (number, run[1], offset + 1)
                continue
            if run is not None:
                pieces.append(self._piece(run))
            run = (number, offset, offset + 1)
        if run is not None:
            pieces.append(self._piece(run))
        return pieces

    def _piece(self, run: tuple[int, int, int]) -> np.ndarray:
        number, first, end = run
        self._segments.move_to_end(number)
        return self._segments[number].values[:, :, :, first:end]

    def add(self, digest: bytes, tokens: tuple[int, ...], start: int, values: np.ndarray) -> None:
        """Keep the KV of positions start to start + n of a generated sequence; known positions keep their place."""
        keys = rolling_hashes(digest, tokens[: start + values.shape[3]])[start:]
        fresh = [(key, offset) for offset, key in enumerate(keys) if key not in self._places]
        if not fresh or values.nbytes > self.budget_bytes:
            return
        number = self._next
        self._next = self._next + 1
        first = fresh[0][1]
        segment = Segment([key for key, _ in fresh], values[:, :, :, first:].copy(), digest)
        self._segments[number] = segment
        self._of_root.setdefault(digest, set()).add(number)
        self._places |= {key: (number, offset - first) for key, offset in fresh}
        self.size_bytes += segment.values.nbytes
        while self.size_bytes > self.budget_bytes:
            self._drop(next(iter(self._segments)))

    def _drop(self, number: int) -> None:
        segment = self._segments.pop(number)
        self.size_bytes -= segment.values.nbytes
        self._of_root[segment.digest].discard(number)
        for key in segment.keys:
            del self._places[key]

    def release(self, root: Root) -> None:
        """Forget everything of one problem."""
        for number in list(self._of_root.get(root.digest, ())):
            self._drop(number)
        self._of_root.pop(root.digest, None)
