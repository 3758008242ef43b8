"""Figures of an ablation: curves over one parameter, heat maps over two, measured points only.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sdt_dist.evaluation.labels import family
from sdt_dist.evaluation.tables import number
from sdt_dist.report.figures.axes import COLOURS, legend, point, reach, subplots, values_axis
from sdt_dist.report.figures.run import Run

Place = tuple[float | None, ...]
_NAMES = {"lambda": "λ", "gamma": "γ", "alpha": "α", "rollouts": "rollouts (budget)"}
_CURVES = {
    "crps": "CRPS (lower is better)",
    "spec_w1": "Spec-W1 (near the truth's)",
    "reward_mean": "mean reward (higher is better)",
    "log_l1": "log-L1 (near the truth's)",
    "ess": "ESS (higher is better)",
}


def ablation(run: Run) -> Figure | None:
    """The measures against what the run's ablation swept; None for a run without one, or where every search of it failed.

    Of more than two parameters the first two with several values vary, at the others' first value.
    """
    swept = run.config.ablate
    across = ([name for name, values in swept.items() if len(values) > 1] or list(swept))[:2]
    fixed = {name: values[0] for name, values in swept.items() if name not in across}
    places = _places(run, across, fixed)
    if not any(_is_swept(found) for found in places.values()):
        return None
    figure = (
        _curves(run, across[0], places) if len(across) == 1 else _heat_maps(run, across, places)
    )
    at = ", ".join(f"{_name(name)} = {value:g}" for name, value in fixed.items())
    figure.suptitle(
        f"Ablation over {' and '.join(map(_name, across))}{f' at {at}' if at else ''}: mean over problems "
        f"({len(run.problems)})"
    )
    return figure


def _is_swept(found: dict[Place, str]) -> bool:
    return any(value is not None for place in found for value in place)


def _name(parameter: str) -> str:
    return _NAMES.get(parameter, parameter)


def _places(
    run: Run, across: list[str], fixed: dict[str, int | float]
) -> dict[str, dict[Place, str]]:
    """{method: {values of `across`: label}} of what was measured at the fixed values; None for what a method lacks."""
    found: dict[str, dict[Place, str]] = {}
    for label, method in run.methods.items():
        if label in run.lines and all(
            method.ablated.get(name, value) == value for name, value in fixed.items()
        ):
            found.setdefault(family(method), {})[
                tuple(method.ablated.get(name) for name in across)
            ] = label
    return found


def _curves(run: Run, parameter: str, places: dict[str, dict[Place, str]]) -> Figure:
    """One panel a measure, one curve with 95% intervals a method; methods that were not swept are dotted lines."""
    # rewards of different gammas do not compare
    left_out = "reward_mean" if "gamma" in run.config.ablate else "log_l1"
    rows = [run.summary[label] for found in places.values() for label in found.values()]
    measures = [name for name in _CURVES if name != left_out and any(name in row for row in rows)]
    figure, grid = subplots(
        1,
        len(measures),
        figsize=(3.1 * len(measures) + 1.6, 3.5),
        squeeze=False,
        layout="constrained",
    )
    for axes, measure in zip(grid[0], measures, strict=True):
        for place, (method, found) in enumerate(places.items()):
            _curve(axes, run, measure, place, method, found)
        if measure in run.truth["summary"]:
            axes.axhline(
                run.truth["summary"][measure]["mean"],
                color="black",
                linestyle="--",
                label="true future",
            )
        values_axis(axes, run.config.ablate[parameter])
        axes.set_xlabel(_name(parameter))
        axes.set_title(_CURVES[measure], fontsize=9)
    legend(grid[0, -1], *grid[0, :-1])
    return figure


def _curve(
    axes: Axes, run: Run, measure: str, place: int, method: str, found: dict[Place, str]
) -> None:
    rows = {
        x: run.summary[label][measure]
        for (x,), label in found.items()
        if measure in run.summary[label]
    }
    if not rows:
        return
    colour = COLOURS[place % len(COLOURS)]
    if None in rows:
        axes.axhline(rows[None]["mean"], color=colour, linestyle=":", label=f"{method} (not swept)")
        return
    order = sorted(x for x in rows if x is not None)
    axes.plot(order, [rows[x]["mean"] for x in order], color=colour, linewidth=1.2)
    for x in order:
        marker = point(axes, x, rows[x]["mean"], place, yerr=reach(rows[x]))
        marker.set_label(method)


def _heat_maps(run: Run, across: list[str], places: dict[str, dict[Place, str]]) -> Figure:
    """One row a method that was swept, one column a measure; a measure has one colour scale. Failed points are blank."""
    swept = {method: found for method, found in places.items() if _is_swept(found)}
    truth = run.truth["summary"].get("spec_w1")
    titles = {"crps": "CRPS (lower is better)"} | (
        {"spec_w1": "|Spec-W1 − the truth's|"} if truth else {}
    )
    values = {
        measure: {
            label: abs(found["mean"] - (truth["mean"] if measure == "spec_w1" else 0.0))
            for label, row in run.summary.items()
            if (found := row.get(measure)) is not None
        }
        for measure in titles
    }
    heights = [len({y for _, y in found}) + 1.2 for found in swept.values()]
    figure, grid = subplots(
        len(swept), len(titles), squeeze=False, layout="constrained", height_ratios=heights,
        figsize=(len(titles) * max(0.75 * len(run.config.ablate[across[0]]) + 1.6, 3.4), 0.5 * sum(heights) + 0.5),
    )  # fmt: skip
    for column, (measure, title) in enumerate(titles.items()):
        shown = [
            values[measure][label]
            for found in swept.values()
            for label in found.values()
            if label in values[measure]
        ]
        low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
        for axes, (method, found) in zip(grid[:, column], swept.items(), strict=True):
            _heat_map(axes, found, values[measure], Normalize(low, high))
            axes.set_title(f"{method}: {title}", fontsize=9)
            axes.set_ylabel(_name(across[1]))
        grid[-1, column].set_xlabel(_name(across[0]))
        figure.colorbar(
            grid[0, column].images[0], ax=list(grid[:, column]), aspect=4 * sum(heights)
        )
    return figure


def _heat_map(
    axes: Axes, found: dict[Place, str], values: dict[str, float], scale: Normalize
) -> None:
    """The values of one method's labels as a grid: first parameter across, second upwards, each written in its cell."""
    xs, ys = (
        sorted({place[i] for place in found}, key=lambda v: -np.inf if v is None else v)
        for i in (0, 1)
    )
    cells = np.array([[values.get(found.get((x, y), ""), np.nan) for x in xs] for y in ys])
    axes.imshow(cells, origin="lower", aspect="auto", cmap="viridis_r", norm=scale)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            is_dark = scale(value) > 0.5
            text = number(float(value))
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if is_dark else "black",
            )
    axes.set_xticks(range(len(xs)), [_text(x) for x in xs])
    axes.set_yticks(range(len(ys)), [_text(y) for y in ys])
    axes.grid(visible=False)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
