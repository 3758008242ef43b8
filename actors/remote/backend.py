"""Starts a fleet's actors where its configuration says, and kills them.

See docs/architecture/fleet.md. Ray restarts and retries nothing here (max_restarts and max_task_retries are 0): the
controller supervises.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdt_dist.actors.config import FleetConfig, Placement
from sdt_dist.actors.endpoint import Endpoint
from sdt_dist.actors.learner import LearningPlan
from sdt_dist.actors.remote.endpoint import RayEndpoint
from sdt_dist.actors.remote.learner import LearnerActor
from sdt_dist.actors.remote.model_server import ModelServerActor
from sdt_dist.actors.remote.searcher import SearcherActor
from sdt_dist.actors.remote.store_shard import StoreShardActor
from sdt_dist.actors.remote.trajectory_buffer import TrajectoryBufferActor
from sdt_dist.actors.work import Loader, load_spec

_OPTIONS = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "max_concurrency": 1000,
    "allow_out_of_order_execution": True,
}


@dataclass(frozen=True, slots=True)
class Order:
    """An actor to start: its class, what it asks of Ray, and its arguments after its name."""

    actor: Any
    options: dict[str, Any]
    arguments: tuple[Any, ...] = ()


class RayBackend:
    """Starts actors of one fleet where its configuration says, and kills them; `loader` makes the run's own model.

    plan: what its learner learns, if it has one. Learner and buffer run beside whoever makes this, so the learner's
    directory is on the driver's machine.
    """

    def __init__(
        self,
        config: FleetConfig,
        loader: Loader,
        namespace: str,
        plan: LearningPlan | None = None,
    ) -> None:
        self._config = config
        self._namespace = namespace
        self._plan = plan
        more_loaders = [partial(load_spec, group.model) for group in config.more_servers]
        self._loaders = [loader, *more_loaders]  # by group
        self._folder = str(Path(tempfile.gettempdir()) / "sdt-evidence" / namespace)
        self._orders: dict[str, Callable[[int], Order]] = {
            "model-server": self._model_server,
            "searcher": self._searcher,
            "store-shard": self._store_shard,
            "trajectory-buffer": self._trajectory_buffer,
            "learner": self._learner,
        }

    def spawn(self, kind: str, index: int, incarnation: int) -> Endpoint:
        """Start an actor; its name tells its place and, from the second on, its incarnation."""
        name = f"{kind}-{index}"
        number = f".{incarnation}" if incarnation else ""
        order = self._orders[kind](index)
        options = order.options | {"name": f"sdt:{name}{number}", "namespace": self._namespace}
        handle = order.actor.options(**options).remote(name, *order.arguments)
        return RayEndpoint(name, handle, incarnation)

    def kill(self, endpoint: Endpoint) -> None:
        """Kill an actor, dead or alive."""
        assert isinstance(endpoint, RayEndpoint)
        ray.kill(endpoint.handle)

    def _model_server(self, index: int) -> Order:
        config = self._config
        group = config.group_of_server[index]
        place = config.placement_of(group)
        threads = config.server_threads
        if not threads and place.gpus == 0:
            threads = max(1, math.ceil(place.cpus))
        arguments = (self._loaders[group], config.queue_rows, threads or None)
        return Order(ModelServerActor, _placed(place), arguments)

    def _searcher(self, index: int) -> Order:
        return Order(SearcherActor, _placed(self._config.searcher))

    def _store_shard(self, index: int) -> Order:
        return Order(StoreShardActor, _placed(self._config.shard), (self._folder,))

    def _trajectory_buffer(self, index: int) -> Order:
        return Order(TrajectoryBufferActor, _here(gpus=0.0), (self._config.buffer_records,))

    def _learner(self, index: int) -> Order:
        return Order(LearnerActor, _here(self._config.learner_gpus), (self._plan,))


def beside_us(actor: Any, gpus: float, options: dict[str, Any], *arguments: Any) -> ActorHandle:
    """An actor on this node that asks for no CPU and ends with whoever called this, as the controller itself."""
    return actor.options(**(_here(gpus) | options)).remote(*arguments)


def _here(gpus: float) -> dict[str, Any]:
    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return _OPTIONS | {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": here}


def _placed(place: Placement) -> dict[str, Any]:
    options = _OPTIONS | {"num_cpus": place.cpus, "num_gpus": place.gpus}
    if place.labels:
        options["label_selector"] = place.labels
    return options
