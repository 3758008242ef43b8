"""Forecast problems: a history, the truth that no reward sees, and how metrics scale them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from sdt_dist.data.registry import load_series
from sdt_dist.data.scale import MIN_HISTORY, Scale, fit_scale
from sdt_dist.data.series import Series
from sdt_dist.errors import ConfigurationError, ContextError, DataError
from sdt_dist.parts import Context, SeriesPart

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ForecastProblem:
    """history [L] and truth [H] of one window in the user's units; metrics z-score by (loc, scale).

    Where a dataset gives no scale and the history is constant, scale is 1; a model refuses such a history.
    """

    index: int
    name: str
    history: np.ndarray
    truth: np.ndarray
    season: int
    loc: float
    scale: float
    timestamps: pd.DatetimeIndex | None = None

    @property
    def context(self) -> Context:
        """What a model continues and a reward may see: the history."""
        return (SeriesPart(self.history),)


def load_problems(
    dataset: str,
    *,
    horizon: int,
    context_length: int = 512,
    num_problems: int | None = None,
    split: str = "test",
    stride: int | None = None,
    channels: list[str] | None = None,
    season: int | None = None,
) -> list[ForecastProblem]:
    """Windows of a dataset whose targets lie in `split`, in channel order; an even choice of `num_problems`.

    stride: rows between targets (default: the horizon, no overlap). Datasets without splits take targets from
    their last quarter, for `val` from the quarter before it. season: replaces the dataset's own. Windows of constant history are kept, so
    that a run counts them as failed. ConfigurationError for a value out of range; DataError when nothing fits;
    ContextError when no history can be scaled.
    """
    _check_ranges(split, horizon=horizon, num_problems=num_problems, stride=stride)
    if context_length < MIN_HISTORY:
        raise ContextError(
            f"context_length: {context_length}, allowed: at least {MIN_HISTORY} values of history."
        )
    chosen = load_series(dataset, season=season, column=channels)
    windows = [
        (s, start)
        for s in chosen
        for start in _targets(s, split, horizon, stride or horizon, context_length)
    ]
    if not windows:
        raise DataError(
            f"dataset {dataset!r}: no window with {MIN_HISTORY} values of history and horizon {horizon} in split {split!r}; "
            "shorten the horizon."
        )
    if num_problems is not None and num_problems < len(windows):
        picks = np.linspace(0, len(windows) - 1, num_problems).round().astype(int)
        windows = [windows[i] for i in picks]
    problems = [
        _problem(i, series, start, horizon, context_length)
        for i, (series, start) in enumerate(windows)
    ]
    if all(_own_scale(problem.history) is None for problem in problems):
        raise ContextError(
            f"dataset {dataset!r}: every history is constant, so nothing can be forecast by a model."
        )
    return problems


def _check_ranges(split: str, **counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigurationError(f"{name}: {value}, must be >= 1.")
    if split not in SPLITS:
        raise DataError(f"split: {split!r}, allowed: {', '.join(SPLITS)}.")


def _targets(
    series: Series, split: str, horizon: int, stride: int, context_length: int
) -> list[int]:
    """First target rows inside the split, with enough history before them."""
    total = len(series.values)
    if series.splits is None:
        quarter = max(total // 4, horizon)
        end = total - quarter if split == "val" else total
        first = max(end - quarter, 0)
    elif split in series.splits:
        first, end = series.splits[split]
    else:
        raise DataError(f"split: {split!r}, allowed: {', '.join(series.splits)}.")
    needed = max(MIN_HISTORY, horizon)
    starts = (
        list(range(end - horizon, first - 1, -stride))
        if series.splits is None
        else list(range(first, end - horizon + 1, stride))
    )
    return sorted(start for start in starts if start >= min(needed, context_length))


def _problem(
    index: int, series: Series, start: int, horizon: int, context_length: int
) -> ForecastProblem:
    history = series.values[max(0, start - context_length) : start]
    own = _own_scale(history) or Scale(float(history.mean()), 1.0)
    return ForecastProblem(
        index=index,
        name=f"{series.name}@{start}",
        history=history,
        truth=series.values[start : start + horizon],
        season=series.season,
        loc=own.loc if series.loc is None else series.loc,
        scale=own.scale if series.scale is None else series.scale,
        timestamps=None
        if series.timestamps is None
        else series.timestamps[max(0, start - context_length) : start + horizon],
    )


def _own_scale(history: np.ndarray) -> Scale | None:
    """The scale of a window; None for a constant one."""
    try:
        return fit_scale(history)
    except ContextError:
        return None
