"""What a sweep may optimise: measures that do not move with what is swept, each with its interval.

See docs/guides/sweeps.md.

It must not know trials, budgets or Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import ConfigurationError, ResultsError, unknown_name
from sdt_dist.evaluation.results import read_lines, read_problems
from sdt_dist.evaluation.summary import tabulate
from sdt_dist.tasks.forecast import FORECAST
from sdt_dist.tasks.task import Row

Rows = dict[int, Row]
Measured = dict[str, dict[str, float]]
_RAW = ("reward", "reward_mean", "reward_best", "log_z")


@dataclass(frozen=True, slots=True)
class Objective:
    """A measure by name: its heading, which values are good, and how it comes from rows by problem and the truth's rows."""

    name: str
    title: str
    of: Callable[[list[Row], list[Row]], dict[str, float]]
    mode: Literal["min", "max"] = "min"

    @property
    def sign(self) -> float:
        """1 where small values are good, -1 where large ones are."""
        return 1.0 if self.mode == "min" else -1.0


def _mean_of(name: str) -> Callable[[list[Row], list[Row]], dict[str, float]]:
    def measure(rows: list[Row], truth: list[Row]) -> dict[str, float]:
        from sdt_dist.metrics.aggregate import summarise

        return summarise(np.array([row[name] for row in rows]))

    return measure


def _wql(rows: list[Row], truth: list[Row]) -> dict[str, float]:
    from sdt_dist.metrics.aggregate import ratio_of_sums

    losses, scales = (np.array([row[name] for row in rows]) for name in ("wql_loss", "wql_scale"))
    return ratio_of_sums(losses, scales)


def _spec_w1_gap(rows: list[Row], truth: list[Row]) -> dict[str, float]:
    """|mean over problems of the samples' Spec-W1 - mean of the true futures' own|, segments of L.

    Its interval is the image under |.| of the signed difference's: it begins at 0 where that one holds 0. Resampling the
    absolute value itself would give intervals that lie above it.
    """
    from sdt_dist.metrics.aggregate import paired_difference

    signed = paired_difference(
        *(np.array([row["spec_w1"] for row in found]) for found in (rows, truth))
    )
    low, high = sorted((abs(signed["low"]), abs(signed["high"])))
    return {
        "mean": abs(signed["mean"]),
        "low": 0.0 if signed["low"] <= 0 <= signed["high"] else low,
        "high": high,
    }


OBJECTIVES = {
    one.name: one
    for one in (
        Objective("crps", "CRPS", _mean_of("crps")),
        Objective("spec_w1_gap", "Spec-W1 gap to the truth", _spec_w1_gap),
        Objective("wql", "WQL", _wql),
        Objective("mase", "MASE", _mean_of("mase")),
        Objective("nfe", "NFE a problem", _mean_of("nfe")),
        Objective("reward", "reward", _mean_of("reward_mean"), "max"),
    )
}


def check_objectives(names: list[str], swept: Iterable[str]) -> None:
    """ConfigurationError for objectives that are unknown, given twice, or say nothing about what is swept."""
    swept = set(swept)
    moving = sorted({"gamma", "inverse_temperature"} & swept)
    for name in names:
        if name in _RAW and (moving or name not in OBJECTIVES):
            raise ConfigurationError(
                f"objectives: {name!r}, but {' and '.join(moving) or 'what is swept'} changes the scale of the reward or how "
                "far samples chase it, so the best value would only be an end of the range; give crps, spec_w1_gap, wql or mase."
            )
        if name not in OBJECTIVES:
            raise unknown_name("objective", name, OBJECTIVES)
    if len(set(names)) < len(names):
        raise ConfigurationError(f"objectives: {', '.join(names)}, each may be given once.")
    if names == ["nfe"]:
        raise ConfigurationError(
            "objectives: nfe alone, whose best is the smallest budget; give a quality beside it."
        )
    if "nfe" in names and not {"rollouts", "max_nfe"} & swept:
        raise ConfigurationError(
            "objectives: nfe, but every trial has the same budget; sweep rollouts in `space`, or leave nfe out."
        )


def measure_directory(directory: Path) -> Measured:
    """Every objective of a finished evaluation of one method, recomputed from its files.

    ResultsError where a search failed: means over fewer problems would not compare with other trials.
    """
    failed = [line for line in read_lines(directory) if line["status"] != "ok"]
    if failed:
        reason = " ".join(failed[0]["error"].split())
        raise ResultsError(
            f"{directory}: {len(failed)} searches failed, the first because: {reason}"
        )
    (rows,) = tabulate(directory).values()
    return measure_rows(rows, read_problems(directory))


def measure_rows(
    rows: Rows, problems: list[ForecastProblem], names: Iterable[str] = OBJECTIVES
) -> Measured:
    """Objectives {name: {mean, low, high}} of rows by problem, 95% bootstrap over problems."""
    truth = truth_rows(problems)
    known = [truth[index] for index in rows]
    chosen = (
        OBJECTIVES[name]
        for name in names
        if name != "spec_w1_gap" or all("spec_w1" in row for row in known)
    )
    return {one.name: one.of(list(rows.values()), known) for one in chosen}


def truth_rows(problems: list[ForecastProblem]) -> Rows:
    """The true futures' own spectral measures by problem."""
    return {problem.index: FORECAST.truth(problem) for problem in problems}
