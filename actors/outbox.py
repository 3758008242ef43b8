"""What a searcher sends to the trajectory buffer: one record after the other, beside its searches.

See docs/concepts/flow.md.

A record is lost with its searcher, or when no buffer can be reached in time; no search waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from sdt_dist.actors.calls import Directory
from sdt_dist.actors.endpoint import GoneError, repeat_while_unreachable
from sdt_dist.actors.trajectory_buffer import SearchRecord
from sdt_dist.errors import SdtError

_MOST_WAITING = 256


class Outbox:
    """Records on their way; `lost` counts those that never got there."""

    def __init__(
        self, directory: Directory, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = directory
        self._timeout_s = timeout_s
        self._clock = clock
        self._waiting: deque[SearchRecord] = deque()
        self._task: asyncio.Task[None] | None = None
        self.lost = 0

    def add(self, record: SearchRecord) -> None:
        """Send a record soon; the oldest of too many is lost."""
        self._waiting.append(record)
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())

    def close(self) -> None:
        """Send no more."""
        if self._task is not None:
            self._task.cancel()

    async def _send(self) -> None:
        while self._waiting:
            record = self._waiting.popleft()
            deadline = self._clock() + self._timeout_s
            try:
                await repeat_while_unreachable(
                    lambda r=record, d=deadline: self._try(r, d),
                    deadline=deadline,
                    clock=self._clock,
                )
            except SdtError:
                self.lost += 1

    async def _try(self, record: SearchRecord, deadline: float) -> None:
        while True:
            buffer = await self._directory.buffer(deadline)
            try:
                return await buffer.call(
                    "put", record, timeout_s=max(deadline - self._clock(), 0.001)
                )
            except GoneError:
                self._directory.suspect(buffer)
