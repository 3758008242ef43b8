"""The actors: thin Ray wrappers over the plain classes, and the backend that starts and kills them.

See docs/architecture/fleet.md.

Ray restarts and retries nothing here (max_restarts and max_task_retries are 0): the controller supervises. Control
methods have their own concurrency group, so that a probe is answered while a batch runs.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sdt_dist.extras import packages_of

with packages_of("cluster", "the fleet"):
    import ray
    from ray.actor import ActorHandle
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdt_dist.actors.calls import Routes
from sdt_dist.actors.config import FleetConfig, Placement
from sdt_dist.actors.controller.controller import Controller, Report
from sdt_dist.actors.endpoint import Endpoint, GoneError, UnreachableError, within
from sdt_dist.actors.exchange import Exchange
from sdt_dist.actors.learner import LearningPlan, LiveLearner
from sdt_dist.actors.metrics import Exporter
from sdt_dist.actors.searcher import Outcome, Searcher, SearcherSettings
from sdt_dist.actors.store_shard import StoreShard
from sdt_dist.actors.trajectory_buffer import SearchRecord, Taken, TrajectoryBuffer
from sdt_dist.actors.work import Loader, Work, load_spec
from sdt_dist.errors import FleetError, ModelGoneError, SdtError
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.card import ModelCard, card_of
from sdt_dist.models.remote.calls import ModelAnswer, ModelCall
from sdt_dist.serving.server import ModelServer
from sdt_dist.values.records import Shared, ShareRequest

_LOG = logging.getLogger(__name__)
_OPTIONS = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "max_concurrency": 1000,
    "allow_out_of_order_execution": True,
}


class RayEndpoint(Endpoint):
    """An actor behind the `Endpoint` seam."""

    def __init__(self, name: str, handle: ActorHandle, incarnation: int) -> None:
        super().__init__(name, incarnation)
        self.handle = handle

    async def call(self, method: str, *arguments: Any, timeout_s: float | None) -> Any:
        what = f"{method} of {self.name}"
        try:
            return await within(getattr(self.handle, method).remote(*arguments), timeout_s, what)
        except ActorDiedError as error:
            raise GoneError(f"{self.name} died: {reason(error)}") from error
        except ActorUnavailableError as error:
            raise UnreachableError(f"{self.name} cannot be reached: {reason(error)}") from error
        except RayTaskError as error:
            if isinstance(error.cause, SdtError):
                raise error.cause from None
            raise FleetError(
                f"{what} raised {type(error.cause).__name__}: {error.cause}"
            ) from error
        except RayError as error:
            raise UnreachableError(f"{what}: {type(error).__name__}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why, in one line: what Ray's message says after its last detail or line of a traceback, which are indented."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    details = [place for place, line in enumerate(lines) if line[0].isspace()]
    last = lines[details[-1] + 1 :] if details else lines
    return " ".join(" ".join(last or lines[-1:]).split()).partition(" Some common causes")[0]


def _exit(error: ModelGoneError) -> None:
    """End this actor, whose model has ended; the controller starts another one."""
    _LOG.error("%s", error)
    os._exit(1)


@ray.remote(concurrency_groups={"control": 4})
class ModelServerActor:
    """One copy of a model; see `ModelServer`."""

    def __init__(self, name: str, loader: Loader, queue_rows: int, threads: int | None) -> None:
        loaded = loader()
        self._threads = threads
        self._limit_threads()
        self._card = card_of(loaded)
        self._server = ModelServer(
            getattr(loaded, "model", loaded), name=name, queue_rows=queue_rows, on_gone=_exit
        )
        self._exporter = Exporter("model_server", name)

    async def answer(self, call: ModelCall) -> ModelAnswer:
        return await self._server.answer(call)

    async def load_flow(self, files: FlowFiles) -> None:
        await self._server.load_flow(files)
        self._limit_threads()

    async def drop_flow(self, identity: str) -> None:
        await self._server.drop_flow(identity)

    async def probe(self) -> None:
        """One token for real."""
        await self._server.probe()

    @ray.method(concurrency_group="control")
    async def card(self) -> ModelCard:
        return self._card

    @ray.method(concurrency_group="control")
    async def status(self) -> dict[str, Any]:
        status = self._server.status()
        self._exporter.export(status)
        return status

    def _limit_threads(self) -> None:
        """Once torch is loaded, with the model or with the first flow, it takes no more cores than the server has."""
        if self._threads is not None and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._threads)

    def __repr__(self) -> str:
        return self._server.name if hasattr(self, "_server") else "model-server (loading)"


@ray.remote(concurrency_groups={"control": 4})
class SearcherActor:
    """Many searches at once; see `Searcher`."""

    def __init__(self, name: str) -> None:
        self._searcher = Searcher(name)
        self._exporter = Exporter("searcher", name)

    async def configure(self, settings: SearcherSettings, routes: Routes) -> None:
        await self._searcher.configure(settings, routes)

    async def search(self, work: Work) -> Outcome:
        return await self._searcher.search(work)

    async def probe(self) -> None:
        """Answered once the search code is loaded."""

    @ray.method(concurrency_group="control")
    async def status(self) -> dict[str, Any]:
        status = self._searcher.status()
        self._exporter.export(status)
        return status

    def __repr__(self) -> str:
        return self._searcher.name


@ray.remote
class StoreShardActor:
    """A shard of the soft-value store; see `StoreShard`. Its methods are quick and run one after the other."""

    def __init__(self, name: str, folder: str) -> None:
        self._shard = StoreShard(name, Path(folder) / f"{name}.npz")
        self._exporter = Exporter("store_shard", name)

    async def exchange(self, requests: Sequence[ShareRequest]) -> list[Shared]:
        return await self._shard.exchange(requests)

    async def probe(self) -> None:
        """Answered once an earlier incarnation's walks are read."""

    async def close(self) -> None:
        await self._shard.close()

    async def status(self) -> dict[str, Any]:
        status = self._shard.status()
        self._exporter.export(status)
        return status

    def __repr__(self) -> str:
        return self._shard.name


@ray.remote
class TrajectoryBufferActor:
    """Finished searches on their way to the learner; see `TrajectoryBuffer`."""

    def __init__(self, name: str, capacity: int) -> None:
        self._buffer = TrajectoryBuffer(name, capacity)
        self._exporter = Exporter("trajectory_buffer", name)

    async def put(self, record: SearchRecord) -> None:
        await self._buffer.put(record)

    async def take(
        self, token: str, held: list[int], kept: list[int], limit: int, wait_s: float
    ) -> Taken:
        return await self._buffer.take(token, held, kept, limit, wait_s)

    async def probe(self) -> None:
        """Always ready."""

    async def status(self) -> dict[str, Any]:
        status = self._buffer.status()
        self._exporter.export(status)
        return status

    def __repr__(self) -> str:
        return self._buffer.name


@ray.remote
class LearnerActor:
    """Trains the flow; see `LiveLearner`. Its methods are quick, as the work has a thread of its own."""

    def __init__(self, name: str, plan: LearningPlan) -> None:
        self._learner = LiveLearner(name, plan)
        self._exporter = Exporter("learner", name)

    async def configure(self, settings: SearcherSettings, routes: Routes) -> None:
        await self._learner.configure(settings, routes)

    async def flow_files(self) -> FlowFiles | None:
        return await self._learner.flow_files()

    async def probe(self) -> None:
        """Always ready."""

    async def status(self) -> dict[str, Any]:
        status = self._learner.status()
        self._exporter.export(status)
        return status

    def __repr__(self) -> str:
        return self._learner.name


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


class RayBackend:
    """Starts actors of one fleet where its configuration says, and kills them; `loader` makes the run's own model.

    plan: what its learner learns, if it has one. Learner and buffer run beside whoever makes this, so the learner's
    directory is on the driver's machine.
    """

    def __init__(
        self, config: FleetConfig, loader: Loader, namespace: str, plan: LearningPlan | None = None
    ) -> None:
        self._config = config
        self._namespace = namespace
        self._plan = plan
        # by group
        self._loaders = [
            loader,
            *(partial(load_spec, group.model) for group in config.more_servers),
        ]
        self._folder = str(Path(tempfile.gettempdir()) / "sdt-evidence" / namespace)

    def spawn(self, kind: str, index: int, incarnation: int) -> Endpoint:
        """Start an actor; its name tells its place and, from the second on, its incarnation."""
        name = f"{kind}-{index}"
        number = f".{incarnation}" if incarnation else ""
        options = {"name": f"sdt:{name}{number}", "namespace": self._namespace}
        if kind == "model-server":
            group = self._config.group_of_server[index]
            place = self._config.placement_of(group)
            threads = self._config.server_threads or (
                max(1, math.ceil(place.cpus)) if place.gpus == 0 else None
            )
            handle = _make(
                ModelServerActor,
                place,
                options,
                name,
                self._loaders[group],
                self._config.queue_rows,
                threads,
            )
        elif kind == "store-shard":
            handle = _make(StoreShardActor, self._config.shard, options, name, self._folder)
        elif kind == "trajectory-buffer":
            handle = beside_us(
                TrajectoryBufferActor, 0.0, options, name, self._config.buffer_records
            )
        elif kind == "learner":
            handle = beside_us(LearnerActor, self._config.learner_gpus, options, name, self._plan)
        else:
            handle = _make(SearcherActor, self._config.searcher, options, name)
        return RayEndpoint(name, handle, incarnation)

    def kill(self, endpoint: Endpoint) -> None:
        """Kill an actor, dead or alive."""
        assert isinstance(endpoint, RayEndpoint)
        ray.kill(endpoint.handle)


def beside_us(actor: Any, gpus: float, options: dict[str, Any], *arguments: Any) -> ActorHandle:
    """An actor on this node that asks for no CPU and ends with whoever called this, as the controller itself."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    chosen = _OPTIONS | options | {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": here}
    return actor.options(**chosen).remote(*arguments)


def _make(actor: Any, place: Placement, options: dict[str, Any], *arguments: Any) -> ActorHandle:
    chosen = _OPTIONS | options | {"num_cpus": place.cpus, "num_gpus": place.gpus}
    if place.labels:
        chosen["label_selector"] = place.labels
    return actor.options(**chosen).remote(*arguments)


@ray.remote(concurrency_groups={"control": 4})
class ControllerActor:
    """The fleet's supervisor; see `Controller`. Actors that it starts end with it."""

    def __init__(
        self,
        config: FleetConfig,
        loader: Loader,
        work: Sequence[Work],
        arguments: dict[str, Any],
        namespace: str,
        plan: LearningPlan | None = None,
    ) -> None:
        backend = RayBackend(config, loader, namespace, plan)
        self._controller = Controller(config, backend, work, learns=plan is not None, **arguments)
        self._exporter = Exporter("controller", "controller")

    async def start(self) -> None:
        self._controller.start()

    async def next_report(self, acknowledged: Sequence[str], timeout_s: float) -> Report:
        report = await self._controller.next_report(acknowledged, timeout_s)
        self._exporter.export(report.status)
        return report

    async def load_flow(self, files: FlowFiles) -> None:
        await self._controller.load_flow(files)

    async def add_work(self, work: Sequence[Work]) -> None:
        await self._controller.add_work(work)

    async def stop(self) -> None:
        await self._controller.stop()

    def __repr__(self) -> str:
        return (
            f"controller ({self._controller.total} searches)"
            if hasattr(self, "_controller")
            else "controller"
        )
