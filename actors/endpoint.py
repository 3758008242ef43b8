"""What one actor sees of another, with Ray's failures as two kinds: gone for good, or unreachable for now.

See docs/architecture/fleet.md.

Everything above this seam is plain asyncio and is tested without Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from sdt_dist.errors import FleetError


class GoneError(FleetError):
    """The other process is dead: what it held is lost, and its calls must be made elsewhere."""


class UnreachableError(FleetError):
    """The call may or may not have arrived; repeat it under the same name."""


class Endpoint:
    """A remote object: `call(method, *arguments, timeout_s)`, named, with the number of its incarnation.

    `first_call` shifts the numbers of its forward passes, so that those of different processes never coincide.
    """

    def __init__(self, name: str, incarnation: int = 0) -> None:
        self.name = name
        self.incarnation = incarnation

    @property
    def first_call(self) -> int:
        place = int("0" + self.name[len(self.name.rstrip("0123456789")) :])
        return (place % 4096 * 4096 + self.incarnation % 4096) << 36

    async def call(self, method: str, *arguments: Any, timeout_s: float | None) -> Any:
        """The result of a method.

        GoneError, UnreachableError, an SdtError of its own, or FleetError after timeout_s (None: never).
        """
        raise NotImplementedError


async def within(awaitable: Any, timeout_s: float | None, what: str) -> Any:
    """Await with a deadline; FleetError says what was waited for.

    Not by `asyncio.wait_for`, which on Python 3.11 forgets a cancellation that meets an answer.
    """
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await awaitable
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise FleetError(f"waited {timeout_s:.0f} s for {what}.") from error


async def repeat_while_unreachable(
    make: Callable[[], Any],
    *,
    deadline: float,
    clock: Callable[[], float],
    pause_s: float = 0.05,
    also: type[FleetError] = UnreachableError,
) -> Any:
    """`await make()` again and again, ever more slowly, while it raises UnreachableError (or `also`).

    The last error is raised when the next try would come after `deadline`.
    """
    while True:
        try:
            return await make()
        except (UnreachableError, also):
            if clock() + pause_s >= deadline:
                raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)


class Backend(Protocol):
    """Starts and kills actors."""

    def spawn(self, kind: str, index: int, incarnation: int) -> Endpoint: ...

    def kill(self, endpoint: Endpoint) -> None: ...
