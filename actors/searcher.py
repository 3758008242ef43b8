"""A searcher without Ray: drives many searches at once in two crews, each with one model call in flight.

See docs/architecture/fleet.md.

While one crew's call is at the server, the other crew selects, scores and backs up. It is the same search code as in
one process: only who answers a crew's rounds differs. It must not import torch.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sdt_dist.actors.calls import (
    Directory,
    RemoteModel,
    Routes,
    ServerCalls,
    ServersDiedError,
    StoreCalls,
)
from sdt_dist.actors.outbox import Outbox
from sdt_dist.actors.trajectory_buffer import SearchRecord
from sdt_dist.actors.work import Work, lean
from sdt_dist.dispatch import join, split
from sdt_dist.errors import FleetError, SdtError
from sdt_dist.models.card import ModelCard, states_of
from sdt_dist.protocols import ModelReply, Root, prompt_digest
from sdt_dist.rewards.context import RewardContext
from sdt_dist.search.api import open_search
from sdt_dist.search.driver import Crew, Ended, Round
from sdt_dist.search.methods import validate_options
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import Reply, Request, SearchProblem, Session
from sdt_dist.training.flow.collect import FinishedSearch

CREWS = 2
_REMEMBERED_OUTCOMES = 64
_RECEIVERS = {"expand": "model", "rollout": "model", "share": "store"}
Outcome = SearchResult | SdtError


@dataclass(frozen=True, slots=True)
class SearcherSettings:
    """Which model is searched, how long its answers may be, the law p, and how long a model call may take."""

    card: ModelCard
    max_new_tokens: int
    law_options: dict[str, Any] = field(default_factory=dict)
    call_timeout_s: float = 600.0


@dataclass(slots=True)
class SearcherCounters:
    """What a searcher did since it started; `advance_s` is its own time in searches, `wait_s` its crews' for models."""

    searches: int = 0
    rounds: int = 0
    leaves: int = 0
    rollouts: int = 0
    nfe: int = 0
    advance_s: float = 0.0
    wait_s: float = 0.0


class _Lane:
    """A crew with its own states, model calls and loop; the model itself is at the servers."""

    def __init__(self, searcher: Searcher, settings: SearcherSettings, number: int) -> None:
        self.model = RemoteModel(settings.card)
        self.states = states_of(
            settings.card, self.model, settings.max_new_tokens, **settings.law_options
        )
        self.crew = Crew(self.model.release)
        self.calls = ServerCalls(
            searcher.caller,
            number,
            searcher.directory,
            self.states.law,
            settings.call_timeout_s,
            searcher.clock,
        )
        self.store = StoreCalls(searcher.directory, settings.call_timeout_s, searcher.clock)
        self.task: asyncio.Task[None] | None = None

    async def answer(self, requests: Sequence[Request]) -> tuple[list[Reply], float]:
        """One model call and one exchange for everything that is asked, in the order it was asked; server seconds."""
        asked = split(requests, _RECEIVERS)
        released = self.model.take_released()
        is_called = asked["model"] or released
        call = self.calls.call(asked["model"], released) if is_called else _nothing()
        exchange = self.store.exchange(asked["store"])
        (answers, seconds), shared = await asyncio.gather(call, exchange)
        replies = join(requests, _RECEIVERS, {"model": answers, "store": shared}, "fleet")
        return replies, seconds


async def _nothing() -> tuple[list[ModelReply], float]:
    return [], 0.0


class Searcher:
    """Makes searches; `search` may be called many times at once, and again under the same name after a lost reply."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.clock = clock
        self.caller = f"{name}/{secrets.token_hex(8)}"  # no incarnation may repeat the name of another one's model call
        self.directory = Directory(clock)
        self.counters = SearcherCounters()
        self._lanes: list[_Lane] = []
        self.outbox: Outbox | None = None
        self._outcomes: dict[str, asyncio.Future[Outcome]] = {}
        self._work_of: dict[int, Work] = {}
        self._rounds: dict[str, int] = {}

    async def configure(self, settings: SearcherSettings, routes: Routes) -> None:
        """What is searched (the first call decides), and the servers that can be called now.

        Once one of these promises seeds only, so does every result from here on: it comes with the route to it.
        """
        if not self._lanes:
            self._lanes = [_Lane(self, settings, number) for number in range(CREWS)]
            self.outbox = Outbox(self.directory, settings.call_timeout_s, self.clock)
        for lane in self._lanes:
            lane.model.deterministic &= settings.card.deterministic
        await self.directory.update(routes)

    async def search(self, work: Work) -> Outcome:
        """The outcome of a search; a search that fails by an error of its own returns that error."""
        future = self._outcomes.get(work.call_name)
        if future is None:
            future = self._outcomes[work.call_name] = asyncio.get_running_loop().create_future()
            while (
                len(self._outcomes) > _REMEMBERED_OUTCOMES
                and next(iter(self._outcomes.values())).done()
            ):
                self._outcomes.pop(next(iter(self._outcomes)))
            self._start(work)
        return await asyncio.shield(future)

    def status(self) -> dict[str, Any]:
        """Counters, and for every search under way its rounds so far and what its crew waits for."""
        under_way = {
            work.call_name: (self._rounds.get(work.call_name, 0), lane.calls.waits_for)
            for lane in self._lanes
            for member in list(lane.crew.running)
            if (work := self._work_of.get(id(member.session))) is not None
        }
        lost = 0 if self.outbox is None else self.outbox.lost
        now = {"searches_under_way": len(under_way), "under_way": under_way, "lost_records": lost}
        return asdict(self.counters) | now

    def _start(self, work: Work) -> None:
        lane = min(self._lanes, key=lambda lane: len(lane.crew.running))
        try:
            session, search = self._open(lane, work)
        except SdtError as error:
            self._outcomes[work.call_name].set_result(error)
            return
        self._work_of[id(session)] = work
        ended = lane.crew.add(session, search)
        if ended is not None:
            self._finish(ended)
        elif lane.task is None or lane.task.done():
            lane.task = asyncio.create_task(self._drive(lane))
            lane.task.add_done_callback(lambda task: self._abandon(lane, task))

    def _open(self, lane: _Lane, work: Work) -> tuple[Session, Any]:
        reward = work.reward.build(RewardContext.of(work.context))
        problem = SearchProblem(work.problem, lane.states.root(work.context), reward)
        options = validate_options(work.method, work.options)
        return open_search(
            lane.states,
            problem,
            method=work.method,
            options=options,
            seed=work.seed,
            cache_name=work.call_name,
            membership=work.present_membership,
            flow=work.flow,
        )

    def _finish(self, ended: Ended) -> None:
        work = self._work_of.pop(id(ended.session))
        self._rounds.pop(work.call_name, None)
        self.counters.searches += 1
        outcome = ended.outcome
        if isinstance(outcome, SearchResult):
            self.counters.rollouts += outcome.rollouts
            self.counters.nfe += outcome.nfe
            if work.for_learning and self.outbox is not None:
                prompt = ended.session.root.prompt  # its digest is this attempt's own
                found = FinishedSearch.of(
                    outcome, Root(prompt, prompt_digest(prompt)), work.problem
                )
                self.outbox.add(SearchRecord(work.name, found, work.flow_version))
            outcome = lean(outcome, work)
        self._outcomes[work.call_name].set_result(outcome)

    async def _drive(self, lane: _Lane) -> None:
        """Rounds of one crew, until it has no search left."""
        while lane.crew.running:
            for ended in await self._make(lane, lane.crew.next_round()):
                self._finish(ended)
            await asyncio.sleep(0)

    def _abandon(self, lane: _Lane, task: asyncio.Task[None]) -> None:
        """A crew that ended by an error that no search is known to have caused: all of its searches end with it."""
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        for ended in lane.crew.fail(
            list(lane.crew.running), FleetError(f"{type(error).__name__}: {error}")
        ):
            self._finish(ended)

    async def _make(self, lane: _Lane, this: Round) -> list[Ended]:
        """Answer a round and let its searches go on.

        Where servers die on the call, each search asks alone, so that only the one that kills servers fails.
        """
        begin = self.clock()
        try:
            replies, seconds = await lane.answer(this.requests)
        except ServersDiedError as error:
            if len(this.members) == 1:
                return lane.crew.fail(this.members, error)
            return [
                ended
                for member in this.members
                for ended in await self._make(lane, Round([member]))
            ]
        except SdtError as error:
            return lane.crew.fail(this.members, error)
        arrived = self.clock()
        ended = lane.crew.resume(this.members, this.by_member(replies), seconds)
        self._count(this, arrived - begin, self.clock() - arrived)
        return ended

    def _count(self, this: Round, wait_s: float, advance_s: float) -> None:
        counters = self.counters
        counters.rounds = counters.rounds + 1
        counters.leaves = counters.leaves + len(this.requests)
        counters.wait_s = counters.wait_s + wait_s
        counters.advance_s = counters.advance_s + advance_s
        for member in this.members:
            work = self._work_of.get(id(member.session))
            if work is not None:
                self._rounds[work.call_name] = self._rounds.get(work.call_name, 0) + 1
