"""Learning beside the searches of a fleet: the places of the learner and its buffer, and its versions on their way.

See docs/concepts/flow.md.

The controller supervises both like any other actor. It must not know torch, Ray or how a flow is trained.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sdt_dist.actors.controller.health import HealthPolicy
from sdt_dist.actors.controller.slots import Slot
from sdt_dist.errors import FleetError, SdtError
from sdt_dist.flow.files import FlowFiles


class Learning:
    """One learner and one buffer.

    load_flow: lets all model servers hold a flow; fail: ends the run. A version that the learner reports is fetched
    (so it is on disk), and `version` is its number once all servers hold it.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        policy: HealthPolicy | None,
        start_timeout_s: float,
        load_flow: Callable[[FlowFiles], Awaitable[None]],
        fail: Callable[[SdtError], None],
    ) -> None:
        self.learner = Slot("learner", 0, clock, policy)
        self.buffer = Slot("trajectory-buffer", 0, clock, policy)
        self.version = 0
        self._timeout_s = start_timeout_s
        self._load_flow = load_flow
        self._fail = fail
        self._is_taking = False

    @property
    def slots(self) -> list[Slot]:
        return [self.learner, self.buffer]

    def watch(self, status: dict[str, Any]) -> None:
        """Look at what the learner says of itself: one that cannot go on ends the run, a new version is fetched."""
        if status["error"] is not None:
            self._fail(FleetError(f"the learner cannot go on: {status['error']}"))
        elif status["version"] > self.version and not self._is_taking:
            self._is_taking = True
            self.learner.background(self._take())

    async def _take(self) -> None:
        try:
            files: FlowFiles = await self.learner.ask("flow_files", self._timeout_s)
            await self._load_flow(files)
            self.version = files.head.info.version
        except FleetError:
            raise  # the learner is gone; the next one reports the version again
        except SdtError as error:
            self._fail(error)
        finally:
            self._is_taking = False
