"""A place in the fleet for one actor: its incarnations come and go, the place stays.

See docs/architecture/fleet.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from sdt_dist.actors.calls import Routes
from sdt_dist.actors.controller.health import Health, HealthPolicy
from sdt_dist.actors.endpoint import Backend, Endpoint, GoneError, repeat_while_unreachable
from sdt_dist.errors import FleetError, SdtError


@dataclass(eq=False)
class Held:
    """What one incarnation of a model server holds, by identity; one caller at a time changes it."""

    names: set[str] = field(default_factory=set)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Slot:
    """One actor's place, with its health, its present incarnation, and what that last said of itself.

    `group` is the place's for good: its number `index` decides what is started there (`FleetConfig.group_of_server`), so
    who replaces a dead model server is of the same group.
    """

    def __init__(
        self,
        kind: str,
        index: int,
        clock: Callable[[], float],
        policy: HealthPolicy | None = None,
        group: int = 0,
    ) -> None:
        self.kind = kind
        self.index = index
        self.name = f"{kind}-{index}"
        self.group = group
        self.health = Health(policy or HealthPolicy(), clock)
        self._clock = clock
        self.endpoint: Endpoint | None = None
        self.incarnation = 0
        self.status: dict[str, Any] = {}
        self.configured = False
        self.routes: Routes | None = None  # as last told to a searcher
        self.held = Held()  # flows of a model server
        self.leases: dict[str, Any] = {}  # what a searcher works on
        self._gone = asyncio.Event()
        self._gone_reason = ""
        self._background: set[asyncio.Task[None]] = set()

    @property
    def is_ready(self) -> bool:
        return self.endpoint is not None and self.health.state in ("ready", "suspect")

    def describe(self) -> dict[str, Any]:
        """State, deaths and last counters, for people and metrics."""
        return {
            "state": self.health.state,
            "reason": self.health.reason,
            "deaths": self.health.deaths,
        } | self.status

    def report_gone(self, reason: str) -> None:
        """Somebody else saw the actor dead: do not wait for the next probe."""
        self._gone_reason = reason
        self._gone.set()

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Tell the actor something without waiting for it; a failure means that it is gone."""
        task = asyncio.create_task(self._reporting(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _reporting(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except SdtError as error:
            self.report_gone(str(error))

    async def live(
        self,
        backend: Backend,
        start_timeout_s: float,
        join: Callable[[Slot], Awaitable[None]],
        watch: Callable[[Slot, dict[str, Any]], None],
    ) -> str:
        """One incarnation from its start to its end; why it ended."""
        self._gone.clear()
        self.health.restarting()
        self.configured = False
        self.routes = None
        self.status = {}
        self.held = Held()
        try:
            self.endpoint = self._spawn(backend)
            await self.ask("probe", start_timeout_s)
            await join(self)
            return await self._watch(watch)
        except SdtError as error:
            return str(error)
        finally:
            self._bury(backend)

    async def ask(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        """What the actor answers, asked again while it cannot be reached."""
        endpoint = self.endpoint
        assert endpoint is not None
        return await repeat_while_unreachable(
            lambda: endpoint.call(method, *arguments, timeout_s=timeout_s),
            deadline=self._clock() + timeout_s,
            clock=self._clock,
        )

    def _spawn(self, backend: Backend) -> Endpoint:
        number = self.incarnation
        self.incarnation = self.incarnation + 1
        try:
            return backend.spawn(self.kind, self.index, number)
        except Exception as error:  # whatever is refused is a start that failed
            raise FleetError(
                f"{self.name} cannot be started: {type(error).__name__}: {error}"
            ) from error

    def _bury(self, backend: Backend) -> None:
        """Kill what may be left, so that no incarnation outlives its place."""
        endpoint = self.endpoint
        self.endpoint = None
        for task in self._background:
            task.cancel()
        if endpoint is not None:
            backend.kill(endpoint)

    async def _watch(self, watch: Callable[[Slot, dict[str, Any]], None]) -> str:
        policy = self.health.policy
        while True:
            try:
                async with asyncio.timeout(policy.probe_s):
                    await self._gone.wait()
                return self._gone_reason
            except TimeoutError:
                pass  # nobody saw it dead: ask it
            assert self.endpoint is not None
            try:
                self.status = await self.endpoint.call("status", timeout_s=policy.probe_timeout_s)
            except GoneError as error:
                return str(error)
            except FleetError as error:
                if self.health.missed(str(error)):
                    return str(error)
            else:
                self.health.answered()
                watch(self, self.status)
