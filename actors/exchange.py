"""Where the trials of a sweep meet its one fleet: searches are left here, outcomes are fetched here.

See docs/guides/sweeps.md.

A client is one budget of one trial. Names of work are unique within a sweep, so work that comes again is known, and what a
client has not acknowledged is kept for it. It must not know Ray, models, budgets or objectives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from sdt_dist.actors.searcher import Outcome
from sdt_dist.actors.work import Work
from sdt_dist.errors import SdtError


class Exchange:
    """Clients `submit` and `collect`; whoever has the fleet will `take` and `give`, and `fail` when it has none any more."""

    def __init__(self) -> None:
        self._queue: list[Work] = []
        self._client_of: dict[str, str] = {}
        self._results: dict[str, dict[str, Outcome]] = {}
        self._changed = asyncio.Condition()
        self._error: SdtError | None = None

    async def submit(self, client: str, work: Sequence[Work]) -> None:
        """Ask for searches; those that are known are left out, so again is harmless. Raises what `fail` was told."""
        self._check()
        fresh = [one for one in work if one.name not in self._client_of]
        self._client_of |= {one.name: client for one in work}
        self._queue += fresh

    async def collect(
        self, client: str, kept: Sequence[str], wait_s: float
    ) -> list[tuple[str, Outcome]]:
        """Forget what the client has `kept`; everything else that is finished for it, waited for at most wait_s.

        Raises what `fail` was told once there is nothing left to fetch.
        """
        own = self._results.setdefault(client, {})
        for name in kept:
            own.pop(name, None)
            self._client_of.pop(name, None)
        with suppress(TimeoutError):  # an empty answer says so
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: own or self._error)
        if not own:
            self._check()
        return list(own.items())

    async def leave(self, client: str) -> None:
        """The client wants nothing more: what it asked for is not searched if it has not begun, and not kept."""
        left = {name for name, owner in self._client_of.items() if owner == client}
        self._queue = [one for one in self._queue if one.name not in left]
        self._results.pop(client, None)
        for name in left:
            del self._client_of[name]

    async def take(self) -> list[Work]:
        """Everything that was asked for since the last call."""
        taken = self._queue
        self._queue = []
        return taken

    async def give(self, name: str, outcome: Outcome) -> None:
        """An outcome for its client; nobody's is dropped."""
        client = self._client_of.get(name)
        if client is not None:
            await self._tell(client, name, outcome)

    async def fail(self, error: SdtError) -> None:
        """There is no fleet any more: whoever waits, or comes later, is told why."""
        async with self._changed:
            self._error = error
            self._changed.notify_all()

    async def _tell(self, client: str, name: str, outcome: Outcome) -> None:
        async with self._changed:
            self._results.setdefault(client, {})[name] = outcome
            self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
