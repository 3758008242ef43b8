"""The controller without Ray: hands out searches, keeps the fleet alive, holds results until they are acknowledged.

See docs/architecture/fleet.md.

It is the one supervisor: every actor is probed, declared dead, and started again from here, and Ray restarts nothing.
A search counts as done when whoever asked for it has acknowledged its result. It must not know Ray, models or disks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sdt_dist.actors.calls import Routes, ServersDiedError
from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.controller.agreement import Agreement
from sdt_dist.actors.controller.flows import FlowLibrary
from sdt_dist.actors.controller.health import HealthPolicy
from sdt_dist.actors.controller.learner_slots import Learning
from sdt_dist.actors.controller.leases import Lease, Leases
from sdt_dist.actors.controller.routing import RouteTable
from sdt_dist.actors.controller.slots import Slot
from sdt_dist.actors.endpoint import Backend, repeat_while_unreachable
from sdt_dist.actors.searcher import CREWS, Outcome, SearcherSettings
from sdt_dist.actors.work import Work
from sdt_dist.errors import FleetError, SdtError
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.card import ModelCard

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What the controller has for its client: unacknowledged results, whether all is done, and the fleet's state."""

    results: list[tuple[str, Outcome]]
    finished: bool
    status: dict[str, Any]


class Controller:
    """Runs `work` on a fleet, whose model servers tell it what they serve; `law_options` change the law p of that.

    learns: whether a learner and a trajectory buffer belong to the fleet.
    """

    def __init__(
        self,
        config: FleetConfig,
        backend: Backend,
        work: Iterable[Work],
        *,
        max_new_tokens: int,
        law_options: dict[str, Any] | None = None,
        flows: Sequence[FlowFiles] = (),
        learns: bool = False,
        policy: HealthPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._backend = backend
        self._clock = clock
        self._max_new_tokens = max_new_tokens
        self._law_options = law_options or {}
        self._leases = Leases(work, config.max_attempts, config.problems_per_searcher)
        groups = enumerate(config.group_of_server)
        self._servers = [Slot("model-server", i, clock, policy, group) for i, group in groups]
        self._flows = FlowLibrary(flows, self._servers, config.start_timeout_s)
        self._flows.check_work(self._leases.queue)
        self._searchers = [Slot("searcher", i, clock, policy) for i in range(config.searchers)]
        shares = any(work.membership is not None for work in self._leases.queue)
        self._shards = [
            Slot("store-shard", i, clock, policy) for i in range(config.shards if shares else 0)
        ]
        self._learning = (
            Learning(clock, policy, config.start_timeout_s, self.load_flow, self._fail)
            if learns
            else None
        )
        self._agreement = Agreement(config.group_names)
        self._fatal: SdtError | None = None
        self._routes = RouteTable()
        self._version = 0
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def total(self) -> int:
        """Searches that were ever asked for."""
        return self._leases.total

    @property
    def slots(self) -> list[Slot]:
        own = [] if self._learning is None else self._learning.slots
        return [*self._servers, *self._searchers, *self._shards, *own]

    def start(self) -> None:
        """Begin, within a running event loop; again is harmless."""
        self._tasks = self._tasks or [self._watched(self._supervise(slot)) for slot in self.slots]

    def _watched(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose unforeseen failure ends the run, which would wait for it for ever."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._check)
        return task

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("the controller failed", exc_info=error)
            self._fail(FleetError(f"the controller failed: {type(error).__name__}: {error}"))

    def _fail(self, error: SdtError) -> None:
        """The fleet cannot go on."""
        self._fatal = self._fatal or error
        self._news.set()

    async def stop(self) -> None:
        """End every wait and every actor; a supervisor that is cancelled buries its actor."""
        for endpoint in [shard.endpoint for shard in self._shards if shard.endpoint is not None]:
            # a shard that is down leaves its snapshot to the system's clean-up
            with suppress(FleetError):
                await endpoint.call("close", timeout_s=2.0)
        leases = self._leases.under_way.values()
        tasks = [*self._tasks, *(lease.task for lease in leases if lease.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def next_report(self, acknowledged: Sequence[str], timeout_s: float) -> Report:
        """Forget acknowledged results; everything else that is finished, waited for at most timeout_s.

        Raises FleetError when the fleet cannot go on, or what was wrong with a flow that it was given.
        """
        self._leases.acknowledge(acknowledged)
        if not self._has_news():
            self._news.clear()
            with suppress(TimeoutError):  # a report without news still tells the state
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
        results = list(self._leases.results.items())
        if self._fatal is not None and not results:
            raise self._fatal
        return Report(results, self._leases.is_finished, self.status())

    async def add_work(self, work: Sequence[Work]) -> None:
        """Queue further searches; those that are known and not acknowledged are left out, so again is harmless."""
        fresh = self._leases.unknown(work)
        self._flows.check_work(fresh)
        self._leases.add(fresh)
        self._dispatch()

    def _has_news(self) -> bool:
        leases = self._leases
        return bool(leases.results) or leases.is_finished or self._fatal is not None

    def status(self) -> dict[str, Any]:
        """Work done, failed, under way and waiting, and every slot's state and counters."""
        leases = self._leases
        return {
            "total": leases.total,
            "done": leases.settled - leases.failed,
            "failed": leases.failed,
            "under_way": len(leases.under_way),
            "waiting": len(leases.queue),
            "restarted_searches": leases.lost,
            "deaths": sum(slot.health.deaths for slot in self.slots),
            "ready_model_servers": sum(slot.is_ready for slot in self._servers),
            "ready_searchers": sum(slot.is_ready for slot in self._searchers),
            "ready_store_shards": sum(slot.is_ready for slot in self._shards),
            "flow_version": self._flows.latest_version,
            "slots": {slot.name: slot.describe() for slot in self.slots},
        }

    async def _supervise(self, slot: Slot) -> None:
        """One slot for ever: start, probe, watch, bury, pause, start again."""
        while slot.health.state != "given up":
            reason = await slot.live(
                self._backend, self.config.start_timeout_s, self._join, self._watch
            )
            pause_s = slot.health.died(reason)
            self._leave(slot, reason)
            await asyncio.sleep(pause_s)
        kin = [other for other in self.slots if other.kind == slot.kind]
        what = slot.kind
        if slot in self._servers and not self._agreement.knows(slot.group):
            # nobody knows what the group serves
            kin = [other for other in kin if other.group == slot.group]
            what += f" of {self.config.group_names[slot.group]}" if self.config.more_servers else ""
        if slot in self._shards or all(other.health.state == "given up" for other in kin):
            self._fail(FleetError(f"no {what} can be started; {slot.name}: {slot.health.reason}"))

    async def _join(self, slot: Slot) -> None:
        """A slot is ready: tell it what it needs, then use it."""
        if slot in self._servers:
            card: ModelCard = await slot.ask("card", self.config.start_timeout_s)
            self._check_card(slot, card)
            await self._give_first_flows(slot)
        slot.health.answered()
        self._publish_routes()
        self._dispatch()

    def _check_card(self, slot: Slot, card: ModelCard) -> None:
        """All servers of a fleet must serve one p: one that does not is refused, and the run where its whole group is new."""
        is_new = not self._agreement.knows(slot.group)
        try:
            self._agreement.add(slot.name, slot.group, card)
        except FleetError as error:
            if is_new:
                self._fail(error)
            raise

    async def _give_first_flows(self, slot: Slot) -> None:
        """Flows of a server that is starting; one that the fleet's model cannot propose with ends the run."""
        try:
            self._flows.check_card(self._agreement.own)
            await self._flows.give(slot)
        except FleetError:
            raise
        except SdtError as error:  # which every other server of its kind would give too
            self._fail(error)
            raise

    async def load_flow(self, files: FlowFiles) -> None:
        """Let every model server, present and future, hold a further flow; then it is the newest (`FlowLibrary.publish`)."""
        await self._flows.publish(files, self._agreement.own)
        self._retire_flows()

    def _retire_flows(self) -> None:
        """Let servers forget the flows that no search will name any more."""
        if len(self._flows) > 1:
            self._flows.retire(self._leases.unfinished())

    def _publish_routes(self) -> None:
        """Settings and routes to ready searchers and the learner where they changed; one out of reach learns them when it is back."""
        ready = [
            server.endpoint
            for server in self._servers
            if server.is_ready and server.endpoint is not None
        ]
        learning = self._learning
        callers = [searcher for searcher in self._searchers if searcher.is_ready]
        callers += [learning.learner] if learning is not None and learning.learner.is_ready else []
        card = self._agreement.card
        if card is None or not callers:
            return
        num_crews = {slot.name: CREWS if slot.kind == "searcher" else 1 for slot in callers}
        crews = [(name, number) for name, count in num_crews.items() for number in range(count)]
        chosen = self._routes.assign(crews, [server.name for server in ready])
        places = {server.name: place for place, server in enumerate(ready)}
        settings = SearcherSettings(
            card, self._max_new_tokens, self._law_options, self.config.call_timeout_s
        )
        shards = tuple(shard.endpoint if shard.is_ready else None for shard in self._shards)
        buffer = (
            learning.buffer.endpoint if learning is not None and learning.buffer.is_ready else None
        )
        self._version += 1
        for slot in callers:
            of_crew = (
                tuple(places[chosen[slot.name, n]] for n in range(num_crews[slot.name]))
                if chosen
                else ()
            )
            routes = Routes(tuple(ready), of_crew, shards, buffer, self._version)
            if routes != slot.routes:
                slot.routes = routes
                slot.background(self._configure(slot, settings, routes))

    async def _configure(self, slot: Slot, settings: SearcherSettings, routes: Routes) -> None:
        endpoint = slot.endpoint
        if endpoint is None:
            return
        limit_s = self.config.start_timeout_s
        try:
            await repeat_while_unreachable(
                lambda: endpoint.call("configure", settings, routes, timeout_s=limit_s),
                deadline=self._clock() + limit_s,
                clock=self._clock,
            )
        except FleetError:
            raise
        except SdtError as error:  # which every other searcher would give too
            self._fail(FleetError(f"{slot.name} cannot search this model: {error}"))
            return
        slot.configured = True
        self._dispatch()

    def _leave(self, slot: Slot, reason: str) -> None:
        """A slot is dead: its searches go back to the front of the queue, its crews to other servers."""
        for lease in reversed(list(slot.leases.values())):
            self._give_back(lease, f"{slot.name} died: {reason}")
        self._publish_routes()
        self._dispatch()

    def _watch(self, slot: Slot, status: dict[str, Any]) -> None:
        """Look at what the learner has, and at a searcher's progress; one whose search makes none for problem_timeout_s is started again."""
        if self._learning is not None and slot is self._learning.learner:
            self._learning.watch(status)
        if slot.kind != "searcher":
            return
        now = self._clock()
        under_way = status["under_way"]
        for lease in list(slot.leases.values()):
            name = lease.work.call_name
            rounds, waits_for = under_way.get(name, (-1, "its reply"))
            if rounds != lease.rounds:
                lease.rounds = rounds
                lease.moved_at = now
            elif now - lease.moved_at > self.config.problem_timeout_s:
                waited = f"no progress for {now - lease.moved_at:.0f} s, waiting for {waits_for or 'itself'}"
                # what it waits for, or its own loop, may never answer
                slot.report_gone(f"{name} made {waited}")

    def _dispatch(self) -> None:
        """Give queued searches to searchers while there is one with room."""
        while self._may_begin():
            slot = self._leases.next_slot(self._searchers)
            if slot is None:
                return
            work = self._flows.fix(self._leases.queue[0])
            lease = self._leases.begin(work, slot, self._clock())
            lease.task = self._watched(self._run(lease))

    def _may_begin(self) -> bool:
        """Whether no model server is in its first start: one that joins later takes crews over, which pay for prompts again.

        So that nfe, and what a budget of it allows, does not depend on which server was quicker. Where results are not
        promised bit by bit, nobody waits for the slowest.
        """
        late = any(
            server.health.state == "starting" and not server.health.deaths
            for server in self._servers
        )
        return not late or not self._agreement.deterministic

    async def _run(self, lease: Lease) -> None:
        """Wait for one search; `_watch` and `_leave` end the wait where nothing moves or its searcher dies."""
        endpoint = lease.slot.endpoint
        assert endpoint is not None
        try:
            outcome = await repeat_while_unreachable(
                lambda: endpoint.call("search", lease.work, timeout_s=None),
                deadline=float("inf"),
                clock=self._clock,
            )
        except SdtError as error:
            lease.slot.report_gone(str(error))
            return  # the slot's supervisor gives its searches back
        if isinstance(outcome, ServersDiedError):
            self._leases.suspect(lease)
        if isinstance(outcome, FleetError):
            self._give_back(lease, str(outcome))
        else:
            self._settle(lease, outcome)
        self._dispatch()

    def _settle(self, lease: Lease, outcome: Outcome) -> None:
        self._leases.settle(lease, outcome)
        self._note_settled()

    def _give_back(self, lease: Lease, reason: str) -> None:
        if self._leases.give_back(lease, reason):
            self._note_settled()

    def _note_settled(self) -> None:
        self._retire_flows()
        self._news.set()
