"""From values per problem to means with 95% bootstrap intervals, and paired differences between methods."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import bootstrap

_RESAMPLES = 2000
_SEED = 0


def interval(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> dict[str, float]:
    """{mean, low, high} of a statistic of paired columns [N]: percentile bootstrap over problems, 95%.

    With fewer than two problems the interval is the value itself.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    value = float(statistic(*arrays, axis=-1))
    if len(arrays[0]) < 2 or all(np.ptp(array) == 0 for array in arrays):
        return {"mean": value, "low": value, "high": value}
    found = bootstrap(
        arrays, statistic, paired=len(arrays) > 1, vectorized=True, n_resamples=_RESAMPLES, method="percentile",
        rng=np.random.default_rng(_SEED),
    )  # fmt: skip
    return {
        "mean": value,
        "low": float(found.confidence_interval.low),
        "high": float(found.confidence_interval.high),
    }


def _mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(values, axis=axis)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.sum(numerator, axis=axis) / np.sum(denominator, axis=axis)


def summarise(values: np.ndarray) -> dict[str, float]:
    """Mean over problems with its interval."""
    return interval(_mean, values)


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> dict[str, float]:
    """sum(numerators) / sum(denominators) over problems with its interval (WQL)."""
    return interval(_ratio, numerators, denominators)


def paired_difference(values: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Mean difference to a baseline on the same problems with its interval."""
    return interval(_mean, np.asarray(values) - np.asarray(baseline))


def ratio_of_means(values: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """mean(values) / mean(baseline) on the same problems with its interval."""
    return interval(_ratio, values, baseline)
