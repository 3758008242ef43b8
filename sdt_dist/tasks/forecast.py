"""Forecasting: the next values of a series, measured by scores of the samples and of their power spectra.

See docs/guides/evaluate.md. Metrics are imported where they are computed: their libraries load torch, which planning a run
must not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdt_dist.data.problems import ForecastProblem, load_problems
from sdt_dist.protocols import Sample
from sdt_dist.tasks.task import Column, Row

_COLUMNS = (
    Column("crps", "CRPS", "CRPS", "lower"),
    Column("wql", "WQL", "WQL", "lower"),
    Column("mase", "MASE", "MASE", "lower"),
    Column("coverage_80", "80% coverage", "cov80", "near .80"),
    Column("spec_w1", "Spec-W1 (L)", "specW1", "near the truth's"),
    Column("spec_w1_half", "Spec-W1 (L/2)", "specW1/2", "near the truth's"),
    Column("log_l1", "log-L1", "logL1", "near the truth's"),
)
_FIELDS = ("index", "name", "history", "truth", "season", "loc", "scale")


class ForecastTask:
    """Forecast problems; samples are series [H] in the user's units."""

    name: str = "forecast"
    columns: tuple[Column, ...] = _COLUMNS
    ratios: Mapping[str, tuple[str, str]] = {"wql": ("wql_loss", "wql_scale")}
    intervals: tuple[str, ...] = ("crps", "spec_w1", "log_l1")
    compared: tuple[str, ...] = ("crps", "spec_w1", "spec_w1_half", "log_l1")
    comparison: str = "CRPS is better below 1"
    tested: tuple[str, ...] = (
        "crps",
        "mase",
        "coverage_80",
        "spec_w1",
        "spec_w1_half",
        "log_l1",
        "reward_mean",
    )
    truth_name: str = "true future"
    figures: tuple[str, ...] = ("quality_cost", "spectra", "fans")

    def problems(self, dataset: str, **choice: Any) -> list[ForecastProblem]:
        """Windows of a dataset; `choice` are the settings of `load_problems`."""
        return load_problems(dataset, **choice)

    def record(self, problem: ForecastProblem) -> dict[str, Any]:
        """History, truth and scale, in the user's units."""
        values = {name: getattr(problem, name) for name in _FIELDS}
        return values | {"history": problem.history.tolist(), "truth": problem.truth.tolist()}

    def problem_of(self, record: Mapping[str, Any]) -> ForecastProblem:
        """The problem of a record, without its timestamps."""
        arrays = {name: np.array(record[name]) for name in ("history", "truth")}
        return ForecastProblem(**{**record, **arrays})

    def sample_record(self, sample: Sample) -> list[float]:
        """The series, to 8 digits."""
        series = sample.series
        return [] if series is None else [float(f"{value:.8g}") for value in series]

    def measures(self, samples: Sequence[Any], problem: ForecastProblem) -> Row:
        """Scores of samples [S, H], their spectra against the history's, and log-L1 of their mean."""
        from sdt_dist.metrics.forecast import forecast_measures, spectral_measures

        values = np.array(samples, dtype=np.float64)
        row = forecast_measures(
            values, problem.truth, problem.history, problem.season, problem.loc, problem.scale
        )
        mean = (values.mean(axis=0, keepdims=True) - problem.loc) / problem.scale
        of_mean = spectral_measures(mean, _standardised_history(problem))
        return row | {
            f"{name}_of_mean": value for name, value in of_mean.items() if name == "log_l1"
        }

    def truth(self, problem: ForecastProblem) -> Row:
        """The true future's own spectral measures against its history."""
        from sdt_dist.metrics.forecast import spectral_measures

        truth = (problem.truth - problem.loc) / problem.scale
        return spectral_measures(truth[None], _standardised_history(problem))

    def length_of(self, problem: ForecastProblem) -> int:
        """H, the horizon."""
        return len(problem.truth)


def _standardised_history(problem: ForecastProblem) -> np.ndarray:
    return (problem.history - problem.loc) / problem.scale


FORECAST = ForecastTask()
