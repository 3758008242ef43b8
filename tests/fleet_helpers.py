"""A fleet without Ray for tests: the real controller, searchers and servers in one event loop, which can be killed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.controller.controller import Controller
from sdt_dist.actors.controller.health import HealthPolicy
from sdt_dist.actors.endpoint import Endpoint, GoneError, UnreachableError, within
from sdt_dist.actors.learner import LearningPlan, LiveLearner
from sdt_dist.actors.searcher import Outcome, Searcher
from sdt_dist.actors.store_shard import StoreShard
from sdt_dist.actors.trajectory_buffer import TrajectoryBuffer
from sdt_dist.actors.work import GivenReward, Work
from sdt_dist.errors import FleetError, SdtError
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.card import card_of
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.parts import TokensPart
from sdt_dist.protocols import Flow, PriorLaw, RolloutRequest, Root
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from sdt_dist.serving.server import ModelServer

TOY = (5, 4, 1.0, "smooth", 5.0, 0)
LAW = PriorLaw((0, 5))
QUICK = HealthPolicy(
    probe_s=0.02, probe_timeout_s=1.0, first_pause_s=0.01, longest_pause_s=0.05, steady_s=0.2
)


class ServerTarget:
    """What a model server's actor offers, without the actor."""

    def __init__(self, loaded: Any, name: str) -> None:
        self.server = ModelServer(getattr(loaded, "model", loaded), name=name)
        self._card = card_of(loaded)
        self.answer = self.server.answer
        self.probe = self.server.probe
        self.load_flow = self.server.load_flow
        self.drop_flow = self.server.drop_flow

    def stop(self) -> None:
        """Its process is dead."""
        self.server.close()

    async def card(self) -> Any:
        return self._card

    async def status(self) -> dict[str, Any]:
        return self.server.status()


class SearcherTarget:
    """What a searcher's actor offers, without the actor."""

    def __init__(self, name: str) -> None:
        self.searcher = Searcher(name)
        self.configure = self.searcher.configure
        self.search = self.searcher.search

    def stop(self) -> None:
        """Its process is dead."""
        for lane in self.searcher._lanes:
            if lane.task is not None:
                lane.task.cancel()
        if self.searcher.outbox is not None:
            self.searcher.outbox.close()

    async def probe(self) -> None:
        """Always ready."""

    async def status(self) -> dict[str, Any]:
        return self.searcher.status()


class ShardTarget:
    """What a store shard's actor offers, without the actor."""

    def __init__(self, name: str, folder: Path) -> None:
        self.shard = StoreShard(name, folder / f"{name}.npz")
        self.exchange = self.shard.exchange
        self.close = self.shard.close

    def stop(self) -> None:
        """Its process is dead."""

    async def probe(self) -> None:
        """Always ready."""

    async def status(self) -> dict[str, Any]:
        return self.shard.status()


class BufferTarget:
    """What a trajectory buffer's actor offers, without the actor."""

    def __init__(self, name: str, capacity: int) -> None:
        self.buffer = TrajectoryBuffer(name, capacity)
        self.put = self.buffer.put
        self.take = self.buffer.take

    def stop(self) -> None:
        """Its process is dead."""

    async def probe(self) -> None:
        """Always ready."""

    async def status(self) -> dict[str, Any]:
        return self.buffer.status()


class LearnerTarget:
    """What a learner's actor offers, without the actor."""

    def __init__(self, name: str, plan: LearningPlan) -> None:
        self.learner = LiveLearner(name, plan)
        self.configure, self.flow_files, self.stop = (
            self.learner.configure, self.learner.flow_files, self.learner.stop,
        )  # fmt: skip

    async def probe(self) -> None:
        """Always ready."""

    async def status(self) -> dict[str, Any]:
        return self.learner.status()


class MortalEndpoint(Endpoint):
    """An endpoint whose process can die, and whose requests and replies can get lost."""

    def __init__(
        self, name: str, incarnation: int, target: Any, loses: Callable[[str], bool]
    ) -> None:
        super().__init__(name, incarnation)
        self.target = target
        self._loses = loses
        self._dead = asyncio.Event()

    def die(self) -> None:
        """SIGKILL: callers see it dead, and it works no more."""
        self._dead.set()
        self.target.stop()

    async def call(self, method: str, *arguments: Any, timeout_s: float | None) -> Any:
        if self._dead.is_set():
            raise GoneError(f"{self.name} is dead")
        if self._loses(method):
            raise UnreachableError("request lost")
        answer = asyncio.ensure_future(getattr(self.target, method)(*arguments))
        death = asyncio.ensure_future(self._dead.wait())
        try:
            wait = asyncio.wait({answer, death}, return_when=asyncio.FIRST_COMPLETED)
            await within(wait, timeout_s, f"{method} of {self.name}")
        finally:
            death.cancel()
            if self._dead.is_set():
                answer.cancel()
        if self._dead.is_set():
            raise GoneError(f"{self.name} died")
        if self._loses(method):
            raise UnreachableError("reply lost")
        try:
            return answer.result()
        except SdtError:
            raise
        except Exception as error:  # as Ray's endpoint does
            raise FleetError(
                f"{method} of {self.name} raised {type(error).__name__}: {error}"
            ) from error


class PlainBackend:
    """Spawns targets in this process; `alive` are the incarnations that nobody killed."""

    def __init__(
        self,
        load: Callable[[], Any],
        loss: float = 0.0,
        seed: int = 0,
        folder: Path | None = None,
        plan: LearningPlan | None = None,
        buffer_records: int = 64,
    ) -> None:
        self._load = load
        self._random = random.Random(seed)
        self.loss = loss
        self._folder = folder
        self._plan = plan
        self._buffer_records = buffer_records
        self.alive: dict[str, MortalEndpoint] = {}
        self.spawned: list[str] = []

    def spawn(self, kind: str, index: int, incarnation: int) -> Endpoint:
        name = f"{kind}-{index}"
        self.spawned.append(name)
        self.alive[name] = MortalEndpoint(name, incarnation, self._make(kind, name), self._loses)
        return self.alive[name]

    def _make(self, kind: str, name: str) -> Any:
        if kind == "store-shard":
            assert self._folder is not None, "a fleet with shards needs a folder"
            return ShardTarget(name, self._folder)
        if kind == "trajectory-buffer":
            return BufferTarget(name, self._buffer_records)
        if kind == "learner":
            assert self._plan is not None, "a fleet with a learner needs a plan"
            return LearnerTarget(name, self._plan)
        return ServerTarget(self._load(), name) if kind == "model-server" else SearcherTarget(name)

    def _loses(self, method: str) -> bool:
        return self._random.random() < self.loss

    def kill(self, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, MortalEndpoint)
        endpoint.die()
        if self.alive.get(endpoint.name) is endpoint:
            del self.alive[endpoint.name]


async def run_controller(
    work: Sequence[Work],
    backend: PlainBackend,
    config: FleetConfig,
    max_new_tokens: int,
    meanwhile: Callable[[Controller], Any] | None = None,
    timeout_s: float = 60.0,
    flows: Sequence[FlowFiles] = (),
) -> dict[str, Outcome]:
    """All outcomes by name; `meanwhile(controller)` is awaited beside the run. Fails on a result given twice."""
    controller = Controller(
        config, backend, work, max_new_tokens=max_new_tokens, flows=flows, policy=QUICK
    )
    controller.start()
    side = asyncio.create_task(meanwhile(controller)) if meanwhile else None
    outcomes: dict[str, Outcome] = {}
    acknowledged: list[str] = []
    try:
        async with asyncio.timeout(timeout_s):
            while not (report := await controller.next_report(acknowledged, 0.5)).finished:
                acknowledged = [name for name, _ in report.results]
                assert not outcomes.keys() & set(acknowledged), "a result came twice"
                outcomes |= dict(report.results)
    finally:
        if side is not None:
            side.cancel()
        await controller.stop()
    return outcomes


def toy_work(model: Toy, methods: dict[str, dict[str, Any]], num_problems: int) -> list[Work]:
    """Searches of one toy by several methods."""
    return [
        Work(
            f"{method}/{index}",
            index,
            (TokensPart((0,)),),
            GivenReward(model),
            method,
            {"inverse_temperature": model.inverse_temperature} | options,
            seed=7,
        )
        for method, options in methods.items()
        for index in range(num_problems)
    ]


def alone(model: Toy, work: Work, flow: Flow | None = None) -> SearchResult:
    """The same search in this process, by itself."""
    process = TokenProcess(model, model.law, model.length)
    problem = SearchProblem(work.problem, process.root(work.context), model)
    runs = run_searches(
        process, [problem], method=work.method, options=work.options, seed=work.seed, flow=flow
    )
    ((_, outcome),) = runs
    assert not isinstance(outcome, SdtError)
    return outcome


def same(have: Outcome, want: SearchResult) -> bool:
    """Whether two results agree in everything that a seed decides, bit by bit."""
    assert isinstance(have, SearchResult), have
    return (
        have.samples == want.samples
        and have.weights == want.weights
        and have.log_z == want.log_z
        and have.flow == want.flow
        and have.finished == want.finished
        and have.cost.reward_calls == want.cost.reward_calls
        and have.cost.rollouts == want.cost.rollouts
    )


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def toy_requests(number: int, rows: int = 2) -> list[RolloutRequest]:
    """Rollouts of TOY that only `number` decides."""
    root = Root((number % 5,), bytes([number]))
    return [RolloutRequest(root, (), 4, key=1000 * number + row) for row in range(rows)]


def toy_tokens(number: int, rows: int = 2, law: PriorLaw = LAW) -> list[list[int]]:
    """What these requests must give."""
    return [reply.tokens.tolist() for reply in Toy(*TOY).rollout(toy_requests(number, rows), law)]
