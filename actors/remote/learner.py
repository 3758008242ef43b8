"""The actor around a `LiveLearner`."""

from __future__ import annotations

from typing import Any

import ray

from sdt_dist.actors.calls import Routes
from sdt_dist.actors.learner import LearningPlan, LiveLearner
from sdt_dist.actors.metrics import Exporter
from sdt_dist.actors.searcher import SearcherSettings
from sdt_dist.flow.files import FlowFiles


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
