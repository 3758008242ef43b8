"""The shared store of evidence, without Ray: per key a grow-only set of finished walks.

See docs/concepts/exactness.md#shared-evidence.

Contract, for `EvidenceStore` here and for whoever puts one behind an actor:

- `exchange(requests)` takes everything in before it answers, then answers in the order asked. It may be repeated, lost
  or reordered at will: adding is the union of sets by (stream, number), so a store is never wrong, only older.
- A stream's walks are visible as a contiguous prefix of its numbers, and each only once every walk that its vector
  names is visible. What arrived too early is kept and waits. Answers and `held` speak of visible walks only.
- Walks come in an order in which each follows all that its vector names, so a reader may join them one by one.
- A store may forget (restart empty, or from an old snapshot): askers see it in `held` and publish again.
- Two different walks under one (stream, number) are refused with ConfigurationError: the caller gave one team name to two
  runs, or one incarnation to two processes. So are walks with other reward terms than their key's. What the batch
  held before such a walk stays.
- All methods are synchronous and quick; calls must not overlap (an actor with one thread, or a lock).
- Shards: `keys.shard_of(key, n)`; each shard is one EvidenceStore and needs nothing of the others.

It must not know trees' internals, budgets or Ray; `soft_values` rebuilds a tree from the walks when it is asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.values.files import read_evidence, write_evidence
from sdt_dist.values.records import Shared, ShareRequest, Vector, WalkRecord, covers

if TYPE_CHECKING:
    from sdt_dist.values.tree import EvidenceTree

_TREES = 8  # rebuilt trees kept for soft_values


class EvidenceStore:
    """Walks by key, in this process; see the module's contract."""

    def __init__(self) -> None:
        self._sets: dict[str, _WalkSet] = {}
        self._trees: OrderedDict[tuple, EvidenceTree] = OrderedDict()

    def exchange(self, requests: Sequence[ShareRequest]) -> list[Shared]:
        """Publish, then get what is new, of many askers at once; ConfigurationError as in the contract."""
        for request in requests:
            self.add(request.key, request.publish, request.closed)
        return [self._answer(request) for request in requests]

    def add(self, key: str, walks: Iterable[WalkRecord], closed: Vector | None = None) -> None:
        """Take walks in; those that are there already change nothing. ConfigurationError for a contradiction."""
        self._set(key).add(walks, closed or {})

    def held(self, key: str) -> dict[str, int]:
        """Visible walks of each stream under a key."""
        return self._set(key).held()

    def walks(self, key: str) -> list[WalkRecord]:
        """All visible walks under a key, each after all that its vector names."""
        return self._set(key).since({}, None)

    def keys(self) -> list[str]:
        """Keys that hold walks."""
        return [key for key, walks in self._sets.items() if walks.num_walks]

    def forget(self, key: str) -> None:
        """Drop a key, for instance once its problem's result is on disk."""
        self._sets.pop(key, None)
        for name in [name for name in self._trees if name[0] == key]:
            del self._trees[name]

    def soft_values(
        self,
        key: str,
        prefixes: Sequence[tuple[int, ...]],
        inverse_temperature: float,
        multipliers: Mapping[str, float],
    ) -> np.ndarray:
        """v [B] = (1/lambda) log M of token prefixes, from a tree of all visible walks under these multipliers.

        A prefix outside the tree has the value that a new node would start with, R of its deepest ancestor there
        (docs/concepts/exactness.md); with no walks at all that is 0. ConfigurationError when the walks' terms are not the multipliers'.
        """
        tree = self._tree(key, inverse_temperature, multipliers)
        return np.array([tree.soft_value(prefix) for prefix in prefixes], dtype=np.float64)

    def snapshot(self, path: str | Path) -> Path:
        """Write everything, what waits included, beside `path`, sync it and rename it there."""
        return write_evidence(path, {k: (s.everything(), s.closed) for k, s in self._sets.items()})

    def restore(self, path: str | Path) -> None:
        """Add what `snapshot` wrote. CheckpointError for a missing, damaged or foreign file."""
        for key, (walks, closed) in read_evidence(path).items():
            self.add(key, walks, closed)

    def stats(self) -> dict[str, int]:
        """keys, walks (visible), waiting (arrived too early) and bytes."""
        sets = list(self._sets.values())
        return {
            "keys": len(self.keys()),
            "walks": sum(s.num_visible for s in sets),
            "waiting": sum(s.num_walks - s.num_visible for s in sets),
            "bytes": sum(s.num_bytes for s in sets),
        }

    def _set(self, key: str) -> _WalkSet:
        return self._sets.setdefault(key, _WalkSet())

    def _answer(self, request: ShareRequest) -> Shared:
        walks = self._set(request.key)
        return Shared(
            tuple(walks.since(request.known, request.team)),
            walks.held(),
            walks.closed_of_team(request.team),
        )

    def _tree(
        self, key: str, inverse_temperature: float, multipliers: Mapping[str, float]
    ) -> EvidenceTree:
        from sdt_dist.values.tree import EvidenceTree

        name = (key, inverse_temperature, tuple(sorted(multipliers.items())))
        tree = self._trees.setdefault(name, EvidenceTree(inverse_temperature, multipliers))
        self._trees.move_to_end(name)
        while len(self._trees) > _TREES:
            self._trees.popitem(last=False)
        tree.join(self._set(key).since(tree.known, None))
        return tree


class _WalkSet:
    """The walks of one key: visible ones in causal order, and those that wait for others."""

    def __init__(self) -> None:
        self.closed: dict[str, int] = {}
        self.num_visible = self.num_walks = self.num_bytes = 0
        self._terms: frozenset[str] = frozenset()
        self._visible: dict[
            str, list[tuple[int, WalkRecord]]
        ] = {}  # (place in causal order, walk) by number
        self._waiting: dict[str, dict[int, WalkRecord]] = {}

    def add(self, walks: Iterable[WalkRecord], closed: Vector) -> None:
        for walk in walks:
            there = self._find(walk.stream, walk.number)
            if there is None:
                self._check_terms(walk)
                self._waiting.setdefault(walk.stream, {})[walk.number] = walk
                self.num_walks += 1
                self.num_bytes += walk.num_bytes
            elif there is not walk:
                _check_same(there, walk)
        for stream, count in closed.items():
            self.closed[stream] = max(count, self.closed.get(stream, 0))
        self._settle()

    def held(self) -> dict[str, int]:
        return {stream: len(walks) for stream, walks in self._visible.items()}

    def since(self, known: Vector, team: str | None) -> list[WalkRecord]:
        """Visible walks of a team (None: of all) outside `known`, in causal order."""
        new = [
            pair
            for stream, walks in self._visible.items()
            if (team is None or _team(stream) == team)
            for pair in walks[known.get(stream, 0) :]
        ]
        new.sort(key=lambda pair: pair[0])
        return [walk for _, walk in new]

    def closed_of_team(self, team: str) -> dict[str, int]:
        return {stream: count for stream, count in self.closed.items() if _team(stream) == team}

    def everything(self) -> list[WalkRecord]:
        return self.since({}, None) + [
            walk for walks in self._waiting.values() for walk in walks.values()
        ]

    def _check_terms(self, walk: WalkRecord) -> None:
        self._terms = self._terms or frozenset(walk.components)
        if self._terms != walk.components.keys():
            raise ConfigurationError(
                f"evidence: a walk with the reward terms {sorted(walk.components)} among walks with "
                f"{sorted(self._terms)}, allowed: one reward's terms a key; name the reward's terms in the key."
            )

    def _find(self, stream: str, number: int) -> WalkRecord | None:
        visible = self._visible.get(stream, [])
        return (
            visible[number][1]
            if number < len(visible)
            else self._waiting.get(stream, {}).get(number)
        )

    def _settle(self) -> None:
        """Make visible what has become so; repeated until nothing changes, since one walk may free another."""
        held = self.held()
        moved = bool(self._waiting)
        while moved:
            moved = False
            for stream, waiting in self._waiting.items():
                while (walk := waiting.get(held.get(stream, 0))) is not None and covers(
                    held, walk.known
                ):
                    del waiting[walk.number]
                    self._visible.setdefault(stream, []).append((self.num_visible, walk))
                    held[stream] = walk.number + 1
                    self.num_visible += 1
                    moved = True
        self._waiting = {stream: waiting for stream, waiting in self._waiting.items() if waiting}


def _team(stream: str) -> str:
    return stream.rsplit("/", 2)[0]


def _check_same(there: WalkRecord, walk: WalkRecord) -> None:
    if there.log_omega != walk.log_omega or not np.array_equal(there.tokens, walk.tokens):
        raise ConfigurationError(
            f"evidence: stream {walk.stream!r} number {walk.number} names two different walks, allowed: one; give every "
            "run its own id and every restarted searcher its own incarnation."
        )
