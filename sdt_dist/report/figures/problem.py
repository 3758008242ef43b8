"""The forecasts of one problem by every method of a run (docs/guides/evaluate.md)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from sdt_dist.report.figures.axes import subplots
from sdt_dist.report.figures.run import Run
from sdt_dist.report.figures.samples import draw_fan

_COLUMNS = 3


def problem_fans(run: Run, index: int) -> Figure | None:
    """Fan charts of one problem, one a method that solved it; None where none did."""
    problem = run.problems[index]
    labels = [label for label, lines in run.lines.items() if index in lines]
    if not labels:
        return None
    columns = min(_COLUMNS, len(labels))
    rows = -(-len(labels) // columns)
    size = (max(6.5, 3.3 * columns), 2.5 * rows + 0.3)
    figure, grid = subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for axes, label in zip(grid.flat, labels, strict=False):
        draw_fan(axes, problem.history, np.array(run.lines[label][index]["samples"]), problem.truth)
        axes.set_title(label, fontsize=10)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(labels))
        if place + columns >= len(labels):
            axes.set_xlabel("steps from now")
            axes.tick_params(labelbottom=True)
    named = grid.flat[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.16 / rows, 1, 1))
    figure.legend(*named, loc="lower center", ncols=len(named[1]), frameon=False, fontsize=9)
    return figure
