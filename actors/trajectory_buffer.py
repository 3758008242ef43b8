"""The trajectory buffer without Ray: finished searches that wait for the learner, the oldest going first.

See docs/concepts/flow.md.

It must not know torch, models or what is learnt.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sdt_dist.training.flow.collect import FinishedSearch

_REMEMBERED_NAMES = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class SearchRecord:
    """One finished search; `name` is its search's at every attempt, `version` the flow's that it drew with (None: p)."""

    name: str
    search: FinishedSearch
    version: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """Records by their numbers in the buffer called `token`, in the order in which they came."""

    token: str
    records: dict[int, SearchRecord]


class TrajectoryBuffer:
    """At most `capacity` records. A death loses them, and nothing else: searches and their results do not need it.

    The newest are taken first, because the flow that drew them is the nearest to the present one. A record stays until whoever
    takes it says that it is kept elsewhere, so a learner that died gets again what its saved state lacks. A record that is
    put again counts once.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self.token = secrets.token_hex(8)
        self._records: dict[int, SearchRecord] = {}  # by number, in the order of their arrival
        self._names: dict[str, None] = {}  # likewise
        self._taken: set[int] = set()
        self._received = self._dropped = self._repeated = 0
        self._changed = asyncio.Condition()

    async def put(self, record: SearchRecord) -> None:
        """Keep a record, the oldest going where room is needed; again is harmless."""
        if record.name in self._names:
            self._repeated += 1
            return
        self._names[record.name] = None
        if len(self._names) > _REMEMBERED_NAMES:
            del self._names[next(iter(self._names))]
        self._received += 1
        self._records[self._received] = record
        if len(self._records) > self.capacity:
            oldest = next(iter(self._records))
            self._dropped += oldest not in self._taken
            self._forget(oldest)
        async with self._changed:
            self._changed.notify_all()

    async def take(
        self, token: str, held: Sequence[int], kept: Sequence[int], limit: int, wait_s: float
    ) -> Taken:
        """The newest records, up to `limit`, waited for up to wait_s, without those whose numbers are `held`.

        Records that are `kept` are forgotten. Both are numbers of the buffer called `token`; of another one, which has died,
        they mean nothing.
        """
        mine = token == self.token
        for number in kept if mine else ():
            self._forget(number)
        self._taken = self._records.keys() & set(held if mine else ())
        if not self._untaken() and wait_s > 0:
            with suppress(TimeoutError):  # an empty answer says so
                async with asyncio.timeout(wait_s), self._changed:
                    await self._changed.wait_for(self._untaken)
        found = {number: self._records[number] for number in self._untaken()[-limit:]}
        self._taken |= found.keys()
        return Taken(self.token, found)

    def status(self) -> dict[str, Any]:
        """Records held, of which so many are not taken; those that came, came again, and went before they were taken."""
        return {
            "held": len(self._records),
            "waiting": len(self._untaken()),
            "received": self._received,
            "repeated": self._repeated,
            "dropped": self._dropped,
        }

    def _untaken(self) -> list[int]:
        return [number for number in self._records if number not in self._taken]

    def _forget(self, number: int) -> None:
        self._records.pop(number, None)
        self._taken.discard(number)
