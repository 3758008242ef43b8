"""Figures show what the result files hold and nothing else (docs/guides/evaluate.md)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.results import tree_path
from sdt_dist.report.figures.cost import quality_against_cost
from sdt_dist.report.figures.draw import draw_all
from sdt_dist.report.figures.run import Run
from sdt_dist.report.figures.samples import spectra
from sdt_dist.report.figures.tree import draw_value_error, first_tree, value_error_by_depth
from sdt_dist.tree.snapshot import Snapshot
from tests.evaluation_helpers import evaluate_into
from tests.search_helpers import run_toy, toy


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    config = EvaluationConfig(
        dataset="classic", num_problems=3, horizon=16, context_length=96, num_rollouts=8, num_samples=6, wave_size=4,
        methods=["sample", "snis", "residual_ts"],
    )  # fmt: skip
    directory: Path = tmp_path_factory.mktemp("run")
    evaluate_into(directory, config)
    return Run(directory)


def _points(axes) -> set[tuple[float, float]]:
    return {
        (float(bars[0].get_xdata()[0]), float(bars[0].get_ydata()[0])) for bars in axes.containers
    }


def test_every_point_of_quality_against_cost_is_in_the_summary(run):
    """At one budget the first panel has one line a method; with other budgets it has their nfe."""
    summary = json.loads((run.directory / "summary.json").read_text())
    seconds = {(row["wall_s"]["mean"], row["crps"]["mean"]) for row in summary.values()}
    figure = quality_against_cost(run)
    assert _points(figure.axes[0]) == {
        (row["crps"]["mean"], float(i)) for i, row in enumerate(summary.values())
    }
    assert _points(figure.axes[1]) == seconds
    other = Run(run.directory)
    other.summary["snis"]["nfe"] = {"mean": 5000.0, "low": 5000.0, "high": 5000.0}
    unmatched = quality_against_cost(other)
    assert _points(unmatched.axes[0]) == {
        (row["nfe"]["mean"], row["crps"]["mean"]) for row in other.summary.values()
    }
    assert _points(unmatched.axes[1]) == seconds
    plt.close("all")


def test_a_method_without_lines_has_no_point(run):
    without = Run(run.directory)
    del without.summary["snis"]
    figure = quality_against_cost(without)
    assert len(figure.axes[0].containers) == 2
    plt.close(figure)


def test_the_mean_forecast_loses_power_at_every_frequency(run):
    """PSD(E x) <= E PSD(x), in the drawn curves; both are geometric means over the same problems."""
    figure = spectra(run)
    curves = {line.get_label(): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    assert (curves["mean of base samples"] <= curves["base samples"] * (1 + 1e-9)).all()
    plt.close(figure)


def test_all_figures_are_written(run):
    names = {path.name for path in draw_all(run.directory)}
    assert {
        "quality_cost.png",
        "rewards.png",
        "spectra.png",
        "fans.png",
        "diversity.png",
        "tree.png",
    } <= names
    assert all((run.directory / "figures" / name).stat().st_size > 5000 for name in names)


def test_value_error_is_zero_once_the_tree_is_exhausted():
    model = toy("U")
    whole = run_toy("U", "residual_ts", 0, num_rollouts=100)
    part = run_toy("U", "residual_ts", 0, num_rollouts=6, wave_size=1)
    values = [run.tree.soft_values(model.inverse_temperature) for run in (whole, part)]
    exact, rough = (
        value_error_by_depth(r.tree, model, v) for r, v in zip((whole, part), values, strict=True)
    )
    assert set(exact) == {0, 1, 2, 3}
    assert max(exact.values()) < 1e-9 < rough[0]
    figure = draw_value_error({"whole": exact, "part": rough})
    drawn = {
        line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines
    }
    assert drawn == {"whole": exact, "part": rough}
    plt.close(figure)


def test_the_tree_figure_shows_the_saved_tree(run):
    figure = first_tree(run)
    saved = Snapshot.load(tree_path(run.directory, "residual_ts"))
    assert len(figure.axes[0].collections[0].get_offsets()) == min(150, saved.tree.size)
    assert saved.counters["rollouts"] == run.lines["residual_ts"][0]["rollouts"]
    plt.close(figure)
