"""A searcher's way to models and stores: sticky routes, retries, failover, deadlines.

See docs/architecture/fleet.md.

A crew of searches keeps one server, where the keys and values of its prompts are cached, until the controller gives it
another one or the server dies. It must not know Ray or what the requests are for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdt_dist.actors.endpoint import Endpoint, GoneError, repeat_while_unreachable
from sdt_dist.errors import FleetError
from sdt_dist.models.card import ModelCard
from sdt_dist.models.remote.calls import BusyError, ModelAnswer, ModelCall
from sdt_dist.models.remote.wire import pack_requests, unpack_replies
from sdt_dist.protocols import ModelReply, ModelRequest, PriorLaw, Root
from sdt_dist.values.keys import shard_of
from sdt_dist.values.records import Shared, ShareRequest

_MOST_DEATHS = 3


class ServersDiedError(FleetError):
    """Server after server died while it worked on the same call."""


class RemoteModel:
    """What is known here of a model that lives elsewhere: its card's facts, and which problems to release there.

    Requests reach it through a `ServerCalls`.
    """

    def __init__(self, card: ModelCard) -> None:
        self.vocab_size = card.vocab_size
        self.max_context = card.max_context
        self.deterministic = card.deterministic
        self._released: list[bytes] = []

    def release(self, root: Root) -> None:
        """Remember a finished problem; the next call tells the server."""
        self._released.append(root.digest)

    def take_released(self) -> tuple[bytes, ...]:
        """The problems to release, each told once."""
        taken = tuple(self._released)
        self._released = []
        return taken


@dataclass(frozen=True, slots=True)
class Routes:
    """Who can be called: the model servers with the place in that list where each crew belongs, the store's shards, the buffer.

    A shard that is down is None; its place among the shards stays. `buffer`: where records of searches go, if anywhere and
    while it is up. Of two routes the one of the larger version holds.
    """

    servers: tuple[Endpoint, ...] = ()
    of_crew: tuple[int, ...] = ()
    shards: tuple[Endpoint | None, ...] = ()
    buffer: Endpoint | None = None
    version: int = field(default=0, compare=False)

    def server(self, crew: int, suspects: set[tuple[str, int]]) -> Endpoint | None:
        """The crew's server; the next in turn where that one is suspected; None when there is none to call."""
        if not self.servers:
            return None
        start = self.of_crew[crew % len(self.of_crew)] if self.of_crew else crew
        order = [self.servers[(start + i) % len(self.servers)] for i in range(len(self.servers))]
        return next(
            (server for server in order if (server.name, server.incarnation) not in suspects), None
        )


class Directory:
    """The routes as the controller last gave them, less what was found dead since."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._routes = Routes()
        self._suspects = set[tuple[str, int]]()
        self._clock = clock
        self._changed = asyncio.Condition()

    async def update(self, routes: Routes) -> None:
        """New routes, unless newer ones came first; who died under a caller stays suspect until its next incarnation."""
        async with self._changed:
            if routes.version >= self._routes.version:
                self._routes = routes
            self._changed.notify_all()

    def suspect(self, dead: Endpoint) -> None:
        """Somebody found this incarnation dead: it is not called again."""
        self._suspects.add((dead.name, dead.incarnation))

    async def server(self, crew: int, deadline: float) -> Endpoint:
        """The server of a crew, waited for while there is none; FleetError at the deadline."""
        return await self._find(
            lambda: self._routes.server(crew, self._suspects), deadline, "a model server"
        )

    async def num_shards(self, deadline: float) -> int:
        """How many shards the store has; waits until that is known."""
        await self._find(lambda: self._routes.shards or None, deadline, "the store's shards")
        return len(self._routes.shards)

    async def shard(self, number: int, deadline: float) -> Endpoint:
        """A shard of the store, waited for while it is down; FleetError at the deadline."""
        return await self._find(lambda: self._shard(number), deadline, f"store shard {number}")

    async def buffer(self, deadline: float) -> Endpoint:
        """The trajectory buffer, waited for while it is down; FleetError at the deadline."""
        return await self._find(
            lambda: self._alive(self._routes.buffer), deadline, "the trajectory buffer"
        )

    def _shard(self, number: int) -> Endpoint | None:
        return self._alive(self._routes.shards[number])

    def _alive(self, found: Endpoint | None) -> Endpoint | None:
        return None if found is None or (found.name, found.incarnation) in self._suspects else found

    async def _find(self, look: Callable[[], Any], deadline: float, what: str) -> Any:
        async with self._changed:
            while (found := look()) is None:
                try:
                    async with asyncio.timeout(max(deadline - self._clock(), 0.0)):
                        await self._changed.wait()
                except TimeoutError as error:
                    raise FleetError(
                        f"waited for {what} that can be called, but none came up in time."
                    ) from error
            return found


class ServerCalls:
    """Model calls of one crew, one at a time."""

    def __init__(
        self,
        owner: str,
        crew: int,
        directory: Directory,
        law: PriorLaw,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owner = owner
        self._crew = crew
        self._directory = directory
        self._law = law
        self._timeout_s = timeout_s
        self._clock = clock
        self._count = 0
        self.waits_for = ""

    async def call(
        self, requests: Sequence[ModelRequest], released: tuple[bytes, ...] = ()
    ) -> tuple[list[ModelReply], float]:
        """Replies in order, and the seconds of server time they cost.

        FleetError at the deadline, ServersDiedError when servers keep dying on this call, or the model's own SdtError.
        """
        self._count += 1
        name = f"{self._owner}/{self._crew}/{self._count}"
        packed = pack_requests(requests, self._law)
        call = ModelCall(name, packed, self._timeout_s, released)
        deaths = list[GoneError]()
        deadline = self._clock() + self._timeout_s
        what = f"{len(requests)} requests"
        try:
            return await repeat_while_unreachable(
                lambda: self._try(call, what, deadline, deaths),
                deadline=deadline,
                clock=self._clock,
                also=BusyError,
            )
        finally:
            self.waits_for = ""

    async def _try(
        self, call: ModelCall, what: str, deadline: float, deaths: list[GoneError]
    ) -> tuple[list[ModelReply], float]:
        """Ask the crew's server, and the next one at once where it is found dead."""
        while len(deaths) < _MOST_DEATHS:
            self.waits_for = f"a model server for {what}"
            server = await self._directory.server(self._crew, deadline)
            self.waits_for = f"{what} at {server.name}"
            left_s = max(deadline - self._clock(), 0.001)
            try:
                reply: ModelAnswer = await server.call(
                    "answer", replace(call, timeout_s=left_s), timeout_s=left_s
                )
                return unpack_replies(reply.packed, server.first_call), reply.seconds
            except GoneError as error:
                self._directory.suspect(server)
                deaths.append(error)
        raise ServersDiedError(
            f"{len(deaths)} model servers died on {what} ({deaths[-1]})."
        ) from deaths[-1]


class StoreCalls:
    """Exchanges with the store's shards; each key lives on one of them."""

    def __init__(
        self, directory: Directory, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = directory
        self._timeout_s = timeout_s
        self._clock = clock

    async def exchange(self, requests: Sequence[ShareRequest]) -> list[Shared]:
        """Answers in order; a shard that died or cannot be reached is asked again, which is harmless, till the deadline."""
        if not requests:
            return []
        deadline = self._clock() + self._timeout_s
        count = await self._directory.num_shards(deadline)
        by_shard: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            by_shard.setdefault(shard_of(request.key, count), []).append(place)
        answers = await asyncio.gather(
            *(
                self._ask(shard, [requests[i] for i in places], deadline)
                for shard, places in by_shard.items()
            )
        )
        found = {
            place: reply
            for places, reply in zip(by_shard.values(), answers, strict=True)
            for place, reply in zip(places, reply, strict=True)
        }
        return [found[place] for place in range(len(requests))]

    async def _ask(
        self, number: int, requests: list[ShareRequest], deadline: float
    ) -> list[Shared]:
        return await repeat_while_unreachable(
            lambda: self._try(number, requests, deadline), deadline=deadline, clock=self._clock
        )

    async def _try(
        self, number: int, requests: list[ShareRequest], deadline: float
    ) -> list[Shared]:
        while True:
            shard = await self._directory.shard(number, deadline)
            try:
                return await shard.call(
                    "exchange", requests, timeout_s=max(deadline - self._clock(), 0.001)
                )
            except GoneError:
                self._directory.suspect(shard)
