"""The actor around a `Controller`, with the backend that starts its fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.controller.controller import Controller, Report
from sdt_dist.actors.learner import LearningPlan
from sdt_dist.actors.metrics import Exporter
from sdt_dist.actors.remote.backend import RayBackend
from sdt_dist.actors.work import Loader, Work
from sdt_dist.flow.files import FlowFiles


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
