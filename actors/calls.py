"""A searcher's way to the model: sticky routes to servers, retries, failover, deadlines (SPEC section 4).

A crew of searches keeps one server, where the keys and values of its prompts are cached, until the controller gives it
another one or the server dies. It must not know Ray or what the requests are for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdt_dist.models.card import ModelCard
from sdt_dist.models.wire import pack_requests, unpack_replies

from actors.endpoint import Endpoint, GoneError, UnreachableError
from actors.model_server import BusyError, ModelAnswer, ModelCall
from sdt_dist.errors import FleetError
from sdt_dist.protocols import ExpandRequest, Expansion, PriorLaw, Rollout, RolloutRequest, Root

_MOST_DEATHS = 3


class ServersDiedError(FleetError):
    """Server after server died while it worked on the same call."""


class RemoteModel:
    """What a process knows of a model that lives elsewhere: its card's facts, and which problems to release there."""

    nfe = 0
    model_calls = 0

    def __init__(self, card: ModelCard) -> None:
        self.vocab_size, self.max_context, self.deterministic = card.vocab_size, card.max_context, card.deterministic
        self._released: list[bytes] = []

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> list[Expansion]:
        raise NotImplementedError("requests to a remote model go through a ServerCalls")

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]:
        raise NotImplementedError("requests to a remote model go through a ServerCalls")

    def release(self, root: Root) -> None:
        """Remember a finished problem; the next call tells the server."""
        self._released.append(root.digest)

    def take_released(self) -> tuple[bytes, ...]:
        """The problems to release, each told once."""
        taken, self._released = tuple(self._released), []
        return taken


@dataclass(frozen=True, slots=True)
class Routes:
    """The model servers that can be called, and the place in that list where each crew of a searcher belongs."""

    servers: tuple[Endpoint, ...] = ()
    of_crew: tuple[int, ...] = ()

    def server(self, crew: int, suspects: set[tuple[str, int]]) -> Endpoint | None:
        """The crew's server; the next in turn where that one is suspected; None when there is none to call."""
        if not self.servers:
            return None
        start = self.of_crew[crew % len(self.of_crew)] if self.of_crew else crew
        order = [self.servers[(start + i) % len(self.servers)] for i in range(len(self.servers))]
        return next((server for server in order if (server.name, server.incarnation) not in suspects), None)


class ServerDirectory:
    """The routes as the controller last gave them, less what was found dead since."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._routes, self._suspects, self._clock = Routes(), set[tuple[str, int]](), clock
        self._changed = asyncio.Condition()

    async def update(self, routes: Routes) -> None:
        """New routes; a server that died under a caller stays suspect until its next incarnation."""
        async with self._changed:
            self._routes = routes
            self._changed.notify_all()

    def suspect(self, server: Endpoint) -> None:
        self._suspects.add((server.name, server.incarnation))

    async def server(self, crew: int, deadline: float) -> Endpoint:
        """The server of a crew, waited for while there is none; FleetError at the deadline."""
        async with self._changed:
            while (found := self._routes.server(crew, self._suspects)) is None:
                left = deadline - self._clock()
                try:
                    await asyncio.wait_for(self._changed.wait(), max(left, 0.0))
                except TimeoutError as error:
                    raise FleetError("waited for a model server that can be called: all of them are down.") from error
            return found


class ServerCalls:
    """Model calls of one crew, one at a time."""

    def __init__(
        self,
        owner: str,
        crew: int,
        directory: ServerDirectory,
        law: PriorLaw,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owner, self._crew, self._directory, self._law = owner, crew, directory, law
        self._timeout_s, self._clock, self._count = timeout_s, clock, 0
        self.waits_for = ""

    async def call(
        self, requests: Sequence[ExpandRequest | RolloutRequest], released: tuple[bytes, ...] = ()
    ) -> tuple[list[Expansion | Rollout], float]:
        """Replies in order, and the seconds of server time they cost.

        FleetError at the deadline, ServersDiedError when servers keep dying on this call, or the model's own SdtError.
        """
        self._count += 1
        name, packed = f"{self._owner}/{self._crew}/{self._count}", pack_requests(requests, self._law)
        deadline, deaths, pause_s = self._clock() + self._timeout_s, 0, 0.05
        while True:
            server = await self._directory.server(self._crew, deadline)
            self.waits_for = f"{len(requests)} requests at {server.name}"
            left = max(deadline - self._clock(), 0.001)
            try:
                reply: ModelAnswer = await server.call(
                    "answer", ModelCall(name, packed, len(requests), left, released), timeout_s=left
                )
            except GoneError as error:
                self._directory.suspect(server)
                deaths += 1
                if deaths >= _MOST_DEATHS:
                    raise ServersDiedError(
                        f"{deaths} model servers died on {len(requests)} requests ({error})."
                    ) from error
            except (UnreachableError, BusyError):
                if self._clock() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 2.0)
            else:
                self.waits_for = ""
                return unpack_replies(reply.packed, server.first_call), reply.seconds
