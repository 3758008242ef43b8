"""The actor around a `Searcher`."""

from __future__ import annotations

from typing import Any

import ray

from sdt_dist.actors.calls import Routes
from sdt_dist.actors.metrics import Exporter
from sdt_dist.actors.searcher import Outcome, Searcher, SearcherSettings
from sdt_dist.actors.work import Work


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
