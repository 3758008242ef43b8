"""What methods measured against one another: quality against cost, diversity against reward.

Methods that all paid the same stand below one another, since against their cost they would be a column of points.
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdt_dist.evaluation.labels import family
from sdt_dist.report.figures.axes import legend, log_axis, point, reach, subplots
from sdt_dist.report.figures.run import Run
from sdt_dist.search.methods import get_method

_SAME_BUDGET = 1.5
_A_FEW = 6  # curves whose intervals can be told apart in one panel


def quality_against_cost(run: Run) -> Figure:
    """CRPS against nfe (one curve over ablated budgets), or by method where all have one budget; and against wall time.

    Many curves stand in a row of panels for each method, or their intervals would hide one another.
    """
    is_matched = _has_one_budget(run)
    rows = [run.curves()] if is_matched else _rows_of(run)
    height = max(4.2, 0.36 * len(run.lines) + 1.2) if is_matched else max(4.2, 2.9 * len(rows))
    figure, grid = subplots(
        len(rows),
        2,
        figsize=(9.5, height),
        sharey=not is_matched,
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for (left, right), curves in zip(grid, rows, strict=True):
        if is_matched:
            _by_method(left, run, "crps")
        else:
            _points(left, run, "nfe", "crps", curves)
        _points(right, run, "wall_s", "crps", curves)
        (right if is_matched else left).set_ylabel("CRPS (lower is better)")
        legend(right)
    if is_matched:
        grid[-1, 0].set_xlabel("CRPS (left is better), at the NFE named")
    else:
        log_axis(grid[-1, 0])
        named = (
            "NFE per problem (matched at each budget)"
            if "rollouts" in run.config.ablate
            else "NFE per problem"
        )
        grid[-1, 0].set_xlabel(named)
    log_axis(grid[-1, 1])
    grid[-1, 1].set_xlabel("seconds per problem")
    figure.suptitle(
        f"Quality against cost: mean over problems ({len(run.problems)}), 95% bootstrap intervals{_part(run)}"
    )
    return figure


def diversity_against_reward(run: Run) -> Figure:
    """Distinct returned samples against their mean reward."""
    figure, axes = subplots(figsize=(6, 3.8))
    _points(axes, run, "reward_mean", "distinct_samples", run.curves())
    axes.set_title(_part(run).strip(), fontsize=8)
    axes.set_xlabel(f"mean reward (right is better{run.reward_note})")
    axes.set_ylabel("distinct samples (higher is more diverse)")
    legend(axes)
    return figure


def _points(axes: Axes, run: Run, x: str, y: str, curves: Mapping[str, list[str]]) -> None:
    """One marker with both intervals a label of these curves that has both measures, joined where they are one curve."""
    for curve, labels in curves.items():
        rows = [row for label in labels if {x, y} <= (row := run.summary.get(label, {})).keys()]
        if len(rows) > 1:
            means = ([row[name]["mean"] for row in rows] for name in (x, y))
            axes.plot(*means, color=run.style(labels[0])["color"], linewidth=1.0)
        for row in rows:
            place = run.place(labels[0])
            bars = {"xerr": reach(row[x]), "yerr": reach(row[y])}
            point(axes, row[x]["mean"], row[y]["mean"], place, **bars).set_label(curve)


def _rows_of(run: Run) -> list[dict[str, list[str]]]:
    """The curves of a run in one row, or where these are many in one row a method."""
    curves = run.curves()
    rows = {}
    for curve, labels in curves.items():
        rows.setdefault(family(run.methods[labels[0]]), {})[curve] = labels
    return [curves] if len(curves) <= _A_FEW or len(rows) == len(curves) else list(rows.values())


def _part(run: Run) -> str:
    """What to add to a title where curves are left out."""
    return "\nof what was swept beside rollouts, the middle values only" if run.is_crowded else ""


def _has_one_budget(run: Run) -> bool:
    """Whether all methods but reference lines cost about the same nfe."""
    methods = {
        label: get_method(next(iter(lines.values()))["method"])
        for label, lines in run.lines.items()
    }
    searched = [label for label, method in methods.items() if not method.reference]
    paid = [run.summary[label]["nfe"]["mean"] for label in searched if label in run.summary]
    return not paid or max(paid) < _SAME_BUDGET * min(paid)


def _by_method(axes: Axes, run: Run, metric: str) -> None:
    """A metric's mean with its interval, one line a method, named with its nfe."""
    shown = [label for label in run.lines if metric in run.summary.get(label, {})]
    for place, label in enumerate(shown):
        found = run.summary[label][metric]
        axes.errorbar(
            found["mean"], place, xerr=reach(found), capsize=3, markersize=7, **run.style(label)
        )
    axes.set_yticks(
        range(len(shown)),
        [f"{label}\n{run.summary[label]['nfe']['mean']:,.0f} NFE" for label in shown],
    )
    axes.set_ylim(len(shown) - 0.5, -0.5)
