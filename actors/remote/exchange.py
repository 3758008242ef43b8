"""The actor around an `Exchange`."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from sdt_dist.actors.exchange import Exchange
from sdt_dist.actors.searcher import Outcome
from sdt_dist.actors.work import Work
from sdt_dist.errors import SdtError


@ray.remote
class ExchangeActor:
    """Where the trials of a sweep meet its fleet; see `Exchange`."""

    def __init__(self) -> None:
        self._exchange = Exchange()

    async def submit(self, client: str, work: Sequence[Work]) -> None:
        await self._exchange.submit(client, work)

    async def collect(
        self, client: str, kept: Sequence[str], wait_s: float
    ) -> list[tuple[str, Outcome]]:
        return await self._exchange.collect(client, kept, wait_s)

    async def leave(self, client: str) -> None:
        await self._exchange.leave(client)

    async def take(self) -> list[Work]:
        return await self._exchange.take()

    async def give(self, name: str, outcome: Outcome) -> None:
        await self._exchange.give(name, outcome)

    async def fail(self, error: SdtError) -> None:
        await self._exchange.fail(error)

    def __repr__(self) -> str:
        return "exchange"
