"""Searches of a run, from the queue to an acknowledged result: who works on what, what is tried again, what is set aside.

A search that was lost goes back to the front of the queue under its next attempt; from some attempt on it has a searcher to
itself, so that one poisonous problem neither stops a run nor drags others down. It must not know Ray, models or disks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sdt_dist.actors.controller.slots import Slot
from sdt_dist.actors.searcher import Outcome
from sdt_dist.actors.work import Work
from sdt_dist.errors import FleetError

# from this attempt on a search shares its searcher with no other, so that only the one to blame fails
_ALONE_FROM = 2


@dataclass(eq=False)
class Lease:
    """A search that a searcher works on; `rounds` is how far it was when it last moved, at `moved_at`."""

    work: Work
    slot: Slot
    task: asyncio.Task[None] | None = None
    rounds: int = -1
    moved_at: float = 0.0

    @property
    def is_alone(self) -> bool:
        """Whether it shares its searcher with no other search."""
        return self.work.attempt >= _ALONE_FROM


class Leases:
    """The queue, what is under way, and results until they are acknowledged.

    max_attempts: so often a search is begun before it is set aside as failed; per_searcher: searches a searcher holds.
    """

    def __init__(self, work: Iterable[Work], max_attempts: int, per_searcher: int) -> None:
        self.queue = deque(work)
        self.under_way: dict[str, Lease] = {}
        self.results: dict[str, Outcome] = {}
        self.total = len(self.queue)
        self.settled = 0
        self.failed = 0
        self.lost = 0
        self._max_attempts = max_attempts
        self._per_searcher = per_searcher
        self._suspects = set[str]()
        self._on_trial = ""

    @property
    def is_finished(self) -> bool:
        """Whether every search has an acknowledged result."""
        return self.settled == self.total and not self.results

    def unfinished(self) -> list[Work]:
        """Searches that wait or are under way."""
        return [*self.queue, *(lease.work for lease in self.under_way.values())]

    def acknowledge(self, names: Sequence[str]) -> None:
        """Forget results that are safe elsewhere."""
        for name in names:
            self.results.pop(name, None)

    def unknown(self, work: Sequence[Work]) -> list[Work]:
        """Those of `work` that are neither queued, nor under way, nor waiting for acknowledgement."""
        queued = {one.name for one in self.queue}
        known = queued | self.under_way.keys() | self.results.keys()
        return [one for one in work if one.name not in known]

    def add(self, work: Sequence[Work]) -> None:
        """Queue further searches."""
        self.queue.extend(work)
        self.total += len(work)

    def next_slot(self, searchers: Sequence[Slot]) -> Slot | None:
        """Who is to get the next search: the least loaded ready searcher with room; None while it must wait.

        A search that model servers died of again and again is tried while nothing else runs: they may have died of others.
        """
        if not self.queue or self._on_trial:
            return None
        alone = self.queue[0].attempt >= _ALONE_FROM
        if alone and self.queue[0].name in self._suspects and self.under_way:
            return None
        open_slots = [searcher for searcher in searchers if self._has_room(searcher, alone)]
        return min(open_slots, key=lambda searcher: len(searcher.leases), default=None)

    def begin(self, work: Work, slot: Slot, now: float) -> Lease:
        """Lease the search that was at the front of the queue, `work` as it is to be made, to a searcher."""
        first = self.queue.popleft()
        on_trial = first.attempt >= _ALONE_FROM and first.name in self._suspects
        self._on_trial = work.name if on_trial else ""
        lease = Lease(work, slot, moved_at=now)
        self.under_way[work.name] = lease
        slot.leases[work.name] = lease
        return lease

    def suspect(self, lease: Lease) -> None:
        """Model servers died while they worked on it."""
        self._suspects.add(lease.work.name)

    def settle(self, lease: Lease, outcome: Outcome) -> None:
        """The search has ended, with a result or with an error of its own."""
        self._release(lease)
        self.results[lease.work.name] = outcome
        self.settled += 1
        self.failed += isinstance(outcome, Exception)

    def give_back(self, lease: Lease, reason: str) -> bool:
        """Queue a lost search again, at the front; True where that was tried often enough and it is set aside instead."""
        if lease.task is not None and lease.task is not asyncio.current_task():
            lease.task.cancel()
        work = replace(lease.work, attempt=lease.work.attempt + 1)
        self.lost += 1
        if work.attempt >= self._max_attempts:
            message = f"set aside after {work.attempt} attempts, the last ended so: {reason}"
            self.settle(lease, FleetError(message))
            return True
        self._release(lease)
        self.queue.appendleft(work)
        return False

    def _has_room(self, slot: Slot, alone: bool) -> bool:
        if not slot.is_ready or not slot.configured:
            return False
        own: list[Lease] = list(slot.leases.values())
        if any(lease.is_alone for lease in own):
            return False
        return not own if alone else len(own) < self._per_searcher

    def _release(self, lease: Lease) -> None:
        name = lease.work.name
        self.under_way.pop(name, None)
        lease.slot.leases.pop(name, None)
        if self._on_trial == name:
            self._on_trial = ""
