"""The health of one actor as a state machine: starting, ready, suspect, dead, and again after a growing pause.

See docs/architecture/fleet.md.

It knows no actor, only what it is told and the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["starting", "ready", "suspect", "dead", "given up"]


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """probe_s between probes of probe_timeout_s each; `misses` in a row are death, unless they failed at once.

    A call that cannot get through fails at once, so death also takes as long as if every missed probe had timed out.
    The pause before a restart doubles from first_pause_s to longest_pause_s and starts over after steady_s without a
    death; `failed_starts` starts in a row that never got ready are the end of it.
    """

    probe_s: float = 1.0
    probe_timeout_s: float = 5.0
    misses: int = 3
    first_pause_s: float = 0.2
    longest_pause_s: float = 30.0
    steady_s: float = 60.0
    failed_starts: int = 3


class Health:
    """One actor's state; `reason` says why it is not ready."""

    def __init__(self, policy: HealthPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy
        self._clock = clock
        self.state: State = "starting"
        self.reason = "it has not answered its first probe yet"
        self.deaths = 0
        self._answered_at = clock()
        self._misses = self._failed_starts = self._deaths_in_a_row = 0
        self._ready_since = clock()

    def answered(self) -> None:
        """A probe was answered: ready, whatever it was before."""
        if self.state == "starting":
            self._ready_since = self._clock()
            self._failed_starts = 0
        self.state, self.reason, self._misses, self._answered_at = "ready", "", 0, self._clock()

    def missed(self, reason: str) -> bool:
        """A probe was not answered; True when that makes it dead."""
        self._misses += 1
        self.state = "suspect"
        self.reason = reason
        silent_s = self._clock() - self._answered_at
        return (
            self._misses >= self.policy.misses
            and silent_s >= self.policy.misses * self.policy.probe_timeout_s
        )

    def died(self, reason: str) -> float:
        """It is dead; the seconds to wait before it is started again (`given up`: it never should be)."""
        if self.state == "starting":
            self._failed_starts += 1
        elif self._clock() - self._ready_since >= self.policy.steady_s:
            self._deaths_in_a_row = 0
        self.state = "dead"
        self.reason = reason
        self._misses = 0
        self.deaths = self.deaths + 1
        self._deaths_in_a_row = self._deaths_in_a_row + 1
        if self._failed_starts >= self.policy.failed_starts:
            self.state = "given up"
        return min(
            self.policy.first_pause_s * 2 ** (self._deaths_in_a_row - 1),
            self.policy.longest_pause_s,
        )

    def restarting(self) -> None:
        """A new incarnation is being started."""
        self.state = "starting"
