"""Rewards of forecasts: bounds, totals, smoothness, closeness to a template.

See docs/guides/rewards.md.

Distances are in standard deviations of the history, so that one weight means the same on every series.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdt_dist.data.scale import fit_scale
from sdt_dist.errors import ConfigurationError
from sdt_dist.metrics.dtw import dtw_distances
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.base import Reward, series_of


class _OneTerm(Reward):
    """A reward of one term over series [B, L]."""

    name = ""

    def __init__(self, history: np.ndarray) -> None:
        self.scale = fit_scale(history).scale

    @property
    def multipliers(self) -> dict[str, float]:
        return {self.name: 1.0}

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        return {self.name: self.term(series_of(samples))}

    def term(self, series: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Bounds(_OneTerm):
    """Minus the mean excess beyond [low, high]; with `hard`, `floor` for any sample that leaves them and 0 else."""

    name = "bounds"
    has_partial = True

    def __init__(
        self,
        history: np.ndarray,
        low: float = -np.inf,
        high: float = np.inf,
        hard: bool = False,
        floor: float = -1000.0,
    ) -> None:
        super().__init__(history)
        if not low < high or not np.isfinite(floor):
            raise ConfigurationError(
                f"bounds: low={low}, high={high}, floor={floor}; needs low < high, a finite floor."
            )
        self.low = low
        self.high = high
        self.hard = hard
        self.floor = floor

    def term(self, series: np.ndarray) -> np.ndarray:
        excess = (np.maximum(self.low - series, 0) + np.maximum(series - self.high, 0)).mean(axis=1)
        return np.where(excess > 0, self.floor, 0.0) if self.hard else -excess / self.scale

    def partial(self, samples: Sequence[Decoded]) -> np.ndarray:
        return self.term(series_of(samples))


def nonneg(history: np.ndarray, hard: bool = False, floor: float = -1000.0) -> Bounds:
    """`Bounds` at 0 from below."""
    return Bounds(history, low=0.0, hard=hard, floor=floor)


class Total(_OneTerm):
    """Minus the distance of the sum over the horizon from a known total, per step."""

    name = "total"

    def __init__(self, history: np.ndarray, value: float) -> None:
        super().__init__(history)
        if not np.isfinite(value):
            raise ConfigurationError(f"total: value={value}, allowed: a finite number.")
        self.value = value

    def term(self, series: np.ndarray) -> np.ndarray:
        return -np.abs(series.sum(axis=1) - self.value) / (self.scale * series.shape[1])


class Smoothness(_OneTerm):
    """Minus the mean squared second difference; 0 for samples of one or two values, which have none."""

    name = "smoothness"

    def term(self, series: np.ndarray) -> np.ndarray:
        if series.shape[1] < 3:
            return np.zeros(len(series))
        return -(np.diff(series, n=2, axis=1) ** 2).mean(axis=1) / self.scale**2


class DtwTemplate(_OneTerm):
    """Minus the DTW distance, per step, to the last values of the history, as many as the sample has."""

    name = "dtw_template"

    def __init__(self, history: np.ndarray) -> None:
        super().__init__(history)
        self.history = np.asarray(history, dtype=np.float64)

    def term(self, series: np.ndarray) -> np.ndarray:
        template = self.history[-series.shape[1] :]
        return -dtw_distances(series / self.scale, template / self.scale) / series.shape[1]
