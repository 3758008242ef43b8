"""An actor behind the `Endpoint` seam: Ray's errors become the fleet's, in words."""

from __future__ import annotations

from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from sdt_dist.actors.endpoint import Endpoint, GoneError, UnreachableError, within
from sdt_dist.errors import FleetError, SdtError


class RayEndpoint(Endpoint):
    """An actor behind the `Endpoint` seam."""

    def __init__(self, name: str, handle: ActorHandle, incarnation: int) -> None:
        super().__init__(name, incarnation)
        self.handle = handle

    async def call(self, method: str, *arguments: Any, timeout_s: float | None) -> Any:
        what = f"{method} of {self.name}"
        try:
            return await within(getattr(self.handle, method).remote(*arguments), timeout_s, what)
        except ActorDiedError as error:
            raise GoneError(f"{self.name} died: {reason(error)}") from error
        except ActorUnavailableError as error:
            raise UnreachableError(f"{self.name} cannot be reached: {reason(error)}") from error
        except RayTaskError as error:
            if isinstance(error.cause, SdtError):
                raise error.cause from None
            raise FleetError(
                f"{what} raised {type(error.cause).__name__}: {error.cause}"
            ) from error
        except RayError as error:
            raise UnreachableError(f"{what}: {type(error).__name__}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why, in one line: what Ray's message says after its last detail or line of a traceback, which are indented."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    details = [place for place, line in enumerate(lines) if line[0].isspace()]
    last = lines[details[-1] + 1 :] if details else lines
    return " ".join(" ".join(last or lines[-1:]).split()).partition(" Some common causes")[0]
