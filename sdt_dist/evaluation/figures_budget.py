"""Quality of methods that all paid the same: by method, since against their cost it would be a column of points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from sdt_dist.search.methods import get_method

if TYPE_CHECKING:
    from sdt_dist.evaluation.figures import Run

_SAME_BUDGET = 1.5


def has_one_budget(run: Run) -> bool:
    """Whether all methods but reference lines cost about the same nfe."""
    methods = {label: get_method(next(iter(lines.values()))["method"]) for label, lines in run.lines.items()}
    searched = [label for label, method in methods.items() if not method.reference]
    paid = [run.summary[label]["nfe"]["mean"] for label in searched if label in run.summary]
    return not paid or max(paid) < _SAME_BUDGET * min(paid)


def by_method(axes: Axes, run: Run, metric: str) -> None:
    """A metric's mean with its interval, one line a method, named with its nfe."""
    shown = [label for label in run.lines if metric in run.summary.get(label, {})]
    for place, label in enumerate(shown):
        found = run.summary[label][metric]
        reach = [[max(found["mean"] - found["low"], 0.0)], [max(found["high"] - found["mean"], 0.0)]]
        axes.errorbar(found["mean"], place, xerr=reach, capsize=3, markersize=7, **run.style(label))
    axes.set_yticks(range(len(shown)), [f"{label}\n{run.summary[label]['nfe']['mean']:,.0f} NFE" for label in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
