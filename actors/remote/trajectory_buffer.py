"""The actor around a `TrajectoryBuffer`."""

from __future__ import annotations

from typing import Any

import ray

from sdt_dist.actors.metrics import Exporter
from sdt_dist.actors.trajectory_buffer import SearchRecord, Taken, TrajectoryBuffer


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
