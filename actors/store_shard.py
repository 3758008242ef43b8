"""One shard of the shared soft-value store without Ray: an `EvidenceStore` that outlives its process.

See docs/concepts/exactness.md#shared-evidence.

Walks are written to a snapshot beside the exchanges, and read back by the next incarnation on the same machine. What a
snapshot lacked is published again by the searchers that know it, so a shard that forgets is older, never wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdt_dist.values.records import Shared, ShareRequest
from sdt_dist.values.store import EvidenceStore

_SNAPSHOT_S = 2.0


class StoreShard:
    """Answers exchanges; writes what it holds to `path` at most every two seconds."""

    def __init__(self, name: str, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.store = EvidenceStore()
        self._path = path
        self._clock = clock
        self.exchanges = self._saved_walks = 0
        self._saved_at = clock()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            self.store.restore(path)

    async def exchange(self, requests: Sequence[ShareRequest]) -> list[Shared]:
        """Publish, then get what is new, of many askers at once."""
        self.exchanges += len(requests)
        shared = self.store.exchange(requests)
        if self._clock() - self._saved_at > _SNAPSHOT_S:
            self.save()
        return shared

    def save(self) -> None:
        """Write a snapshot if there is anything new."""
        walks = self.store.stats()["walks"]
        if walks > self._saved_walks:
            self.store.snapshot(self._path)
            self._saved_walks = walks
        self._saved_at = self._clock()

    async def close(self) -> None:
        """Remove the snapshot: the run is over."""
        self._path.unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """Sizes and exchanges so far."""
        return self.store.stats() | {"exchanges": self.exchanges}
