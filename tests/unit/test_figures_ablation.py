"""Figures of ablations show what summary.json holds and nothing else (docs/guides/evaluate.md)."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sdt_dist.evaluation.executor import InProcess
from sdt_dist.models.loading import load_model
from sdt_dist.report.figures.ablation import ablation
from sdt_dist.report.figures.cost import quality_against_cost
from sdt_dist.report.figures.draw import draw_all
from sdt_dist.report.figures.run import Run
from tests.evaluation_helpers import evaluate_into

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "num_problems": 2, "horizon": 8, "context_length": 64, "num_rollouts": 8, "num_samples": 4, "wave_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    model = load_model("bundled")

    def run(methods: list[str], ablate: dict) -> Run:
        directory: Path = tmp_path_factory.mktemp("run") / "run"
        settings = {**SETTINGS, "methods": methods, "ablate": ablate}
        evaluate_into(directory, settings, executor=InProcess(lambda _: model))
        return Run(directory)

    return run


@pytest.fixture(scope="module")
def by_rollouts(evaluate) -> Run:
    return evaluate(["sample", "snis", "mcts"], {"rollouts": [2, 8, 32]})


@pytest.fixture(scope="module")
def by_three(evaluate) -> Run:
    return evaluate(
        ["sample", "snis", "mcts"], {"lambda": [1, 3], "rollouts": [2, 4, 8], "gamma": [2, 0.5]}
    )


def test_curves_go_through_the_measured_points_alone(by_rollouts):
    summary = by_rollouts.summary
    truth = by_rollouts.truth["summary"]
    figure = ablation(by_rollouts)
    panels = {axes.get_title().split(" (")[0]: axes for axes in figure.axes}
    assert list(panels) == ["CRPS", "Spec-W1", "mean reward", "ESS"]
    for axes, measure in zip(
        panels.values(), ("crps", "spec_w1", "reward_mean", "ess"), strict=True
    ):
        drawn = {
            (float(bar[0].get_xdata()[0]), float(bar[0].get_ydata()[0])) for bar in axes.containers
        }
        rows = {(m, r): summary[f"{m}[rollouts={r}]"] for m in ("snis", "mcts") for r in (2, 8, 32)}
        assert (
            drawn
            == {(r, row[measure]["mean"]) for (_, r), row in rows.items() if measure in row}
            != set()
        )
        levels = {
            line.get_label(): line.get_ydata()[0]
            for line in axes.lines
            if line.get_linestyle() in (":", "--")
        }
        want = {"sample (not swept)": summary["sample"][measure]["mean"]}
        assert levels == want | (
            {"true future": truth[measure]["mean"]} if measure in truth else {}
        )
        assert axes.get_xscale() == "log" and list(axes.get_xticks()) == [2, 8, 32]
    bars = panels["CRPS"].containers[0]
    low, high = bars[2][0].get_segments()[0][:, 1]
    found = summary["snis[rollouts=2]"]["crps"]
    assert (low, high) == pytest.approx((min(found["low"], found["mean"]), found["high"]))
    plt.close(figure)


def test_quality_against_cost_joins_the_budgets_of_a_method(by_rollouts):
    figure = quality_against_cost(by_rollouts)
    for axes, cost in zip(figure.axes[:2], ("nfe", "wall_s"), strict=True):
        joined = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 3]
        for method, points in zip(("snis", "mcts"), joined, strict=True):
            rows = [by_rollouts.summary[f"{method}[rollouts={r}]"] for r in (2, 8, 32)]
            assert points == [[row[cost]["mean"], row["crps"]["mean"]] for row in rows]
        assert len(axes.containers) == 7
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == [
        "sample",
        "snis",
        "mcts",
    ]
    plt.close(figure)


def test_heat_maps_hold_the_summary_at_the_other_parameters_first_value(by_three):
    figure = ablation(by_three)
    assert "over λ and rollouts (budget) at γ = 2:" in figure.get_suptitle()
    summary = by_three.summary
    truth = by_three.truth["summary"]["spec_w1"]["mean"]
    maps = {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in figure.axes[:4]}
    for method in ("snis", "mcts"):
        columns = ("lambda=1,", "lambda=3,") if method == "snis" else ("",)
        rows = [[summary[f"{method}[{x}rollouts={y},gamma=2]"] for x in columns] for y in (2, 4, 8)]
        crps = [[row["crps"]["mean"] for row in line] for line in rows]
        gap = [[abs(row["spec_w1"]["mean"] - truth) for row in line] for line in rows]
        assert maps[f"{method}: CRPS (lower is better)"].tolist() == crps
        assert maps[f"{method}: |Spec-W1 − the truth's|"].tolist() == gap
    plt.close(figure)


def test_a_crowd_of_curves_is_thinned_to_the_middle_and_says_so(evaluate, by_three):
    assert len(by_three.curves()) == 7
    run = evaluate(
        ["sample", "snis"], {"lambda": [float(i) for i in range(1, 16)], "rollouts": [4, 8]}
    )
    assert run.aligned == "snis[lambda=8,rollouts=8]"
    assert run.curves() == {
        "sample": ["sample"],
        "snis[lambda=8]": [f"snis[lambda=8,rollouts={r}]" for r in (4, 8)],
    }
    figure = quality_against_cost(run)
    assert "middle values only" in figure.get_suptitle() and len(figure.axes[0].containers) == 3
    plt.close(figure)


def test_rewards_are_not_compared_across_gammas(evaluate, by_rollouts):
    run = evaluate(["snis"], {"gamma": [0.5, 2], "lambda": [3]})
    figure = ablation(run)
    assert [axes.get_title().split(" (")[0] for axes in figure.axes] == [
        "CRPS",
        "Spec-W1",
        "log-L1",
        "ESS",
    ]
    assert "over γ at λ = 3:" in figure.get_suptitle() and figure.axes[0].get_xscale() == "linear"
    assert "every label by its own reward" in run.reward_note and not by_rollouts.reward_note
    plt.close(figure)


def test_figures_of_an_ablation_are_written_and_a_plain_run_has_none(evaluate, by_three):
    assert {path.stem for path in draw_all(by_three.directory)} >= {
        "ablation",
        "quality_cost",
        "diversity",
    }
    assert ablation(evaluate(["snis"], {})) is None


def test_many_curves_stand_in_a_row_of_panels_for_each_method(by_three):
    figure = quality_against_cost(by_three)
    grid = [figure.axes[place : place + 2] for place in range(0, len(figure.axes), 2)]
    rows = [[text.get_text() for text in right.get_legend().get_texts()] for _, right in grid]
    assert len(rows) > 1 and sorted(curve for row in rows for curve in row) == sorted(
        by_three.curves()
    )
    assert all(len({curve.partition("[")[0] for curve in row}) == 1 for row in rows)
    plt.close(figure)
