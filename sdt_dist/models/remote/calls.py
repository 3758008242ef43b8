"""One call of a model that is elsewhere: packed requests under a name, packed replies, and how a call is refused.

See docs/architecture/fleet.md.

It must not know who serves the model, nor how calls travel.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdt_dist.errors import ConfigurationError, FleetError
from sdt_dist.models.remote.columns import Arrays


class BusyError(FleetError):
    """The queue is full, or the server stops; try again in a moment."""


class LateError(FleetError):
    """The caller's time was over before the model was free; the call was not begun."""


class NameTakenError(ConfigurationError):
    """A call has the name of another one."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """Packed requests of one caller. `name` is unique; `timeout_s` is how long it may wait for its turn.

    `released`: digests of problems that are over.
    """

    name: str
    packed: Arrays
    timeout_s: float
    released: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """Packed replies, and this call's share, by rows, of the seconds that its batch took."""

    packed: Arrays
    seconds: float
