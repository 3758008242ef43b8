"""What one search has paid, and how many rollouts it may start still.

See docs/concepts/exactness.md#cost.

It must not know trees, methods, models or rewards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sdt_dist.protocols import Cost
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.result import SearchCost


@dataclass
class Budget:
    """Counters of a search under way, against the limits of its options.

    tokens_per_rollout: what a rollout costs at most, in next-token distributions. calls: numbers of the forward passes
    that it took part in; earlier_calls: how many an earlier search, which it goes on with, took part in. wall_s: its equal
    share of the rounds in which it took part.
    """

    tokens_per_rollout: int
    clock: Callable[[], float] = time.monotonic
    nfe: int = 0
    calls: set[int] = field(default_factory=set)
    earlier_calls: int = 0
    recomputed_tokens: int = 0
    rollouts: int = 0
    reward_calls: int = 0
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        self._started = self.clock()

    def go_on_from(self, counters: Mapping[str, float]) -> None:
        """Take over the bill of an earlier search of the same problem: a `SearchCost` by field."""
        self.nfe = int(counters["nfe"])
        self.rollouts = int(counters["rollouts"])
        self.reward_calls = int(counters["reward_calls"])
        self.recomputed_tokens = int(counters["recomputed_tokens"])
        self.earlier_calls = int(counters["model_calls"])
        self.wall_s = counters["wall_s"]

    def pay(self, cost: Cost) -> None:
        """Count what a reply cost."""
        self.nfe += cost.nfe
        self.calls |= cost.calls
        self.recomputed_tokens += cost.recomputed_tokens

    def cost(self) -> SearchCost:
        """The counters so far."""
        return SearchCost(
            nfe=self.nfe,
            model_calls=self.earlier_calls + len(self.calls),
            rollouts=self.rollouts,
            reward_calls=self.reward_calls,
            recomputed_tokens=self.recomputed_tokens,
            wall_s=self.wall_s,
        )

    def elapsed_s(self) -> float:
        """Seconds since the search was opened."""
        return self.clock() - self._started

    def next_wave(self, options: SearchOptions, wave_size: int) -> int:
        """How many rollouts to start now, at most wave_size; 0 when the budget is spent, within one wave."""
        if self._is_out_of_time(options):
            return 0
        allowed = wave_size
        if options.rollout_limit is not None:
            allowed = min(allowed, options.rollout_limit - self.rollouts)
        if options.max_nfe is not None:
            allowed = min(allowed, self._affordable(options.max_nfe))
        return max(allowed, 0)

    def _is_out_of_time(self, options: SearchOptions) -> bool:
        """Whether the time is over; a search has one wave whatever the time."""
        if options.time_budget_s is None or not self.rollouts:
            return False
        return self.elapsed_s() >= options.time_budget_s

    def _affordable(self, max_nfe: int) -> int:
        """How many rollouts of the usual cost are left in max_nfe; before the first, of the largest cost and one at least."""
        left = max_nfe - self.nfe
        if not self.rollouts:
            return max(round(left / max(self.tokens_per_rollout, 1.0)), 1)
        usual = self.nfe / self.rollouts
        return round(left / max(usual, 1.0))
