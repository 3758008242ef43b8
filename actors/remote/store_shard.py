"""The actor around a `StoreShard`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from sdt_dist.actors.metrics import Exporter
from sdt_dist.actors.store_shard import StoreShard
from sdt_dist.values.records import Shared, ShareRequest


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
