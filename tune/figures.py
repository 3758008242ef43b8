"""Figures of a sweep, drawn from its trials alone: every point was measured.

See docs/guides/sweeps.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from sdt_dist.report.figures.axes import subplots
from sdt_dist.report.figures.files import draw
from sdt_dist.report.write import SUFFIXES
from sdt_dist.tune.choice import Point, common_values
from sdt_dist.tune.config import SweepConfig, front_axes, quality
from sdt_dist.tune.ledger import TrialLine
from sdt_dist.tune.objectives import OBJECTIVES
from sdt_dist.tune.screening import Cell

_MARKERS = "osD^vPX*<>ph"
_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#6A3D9A", "#8B4513"]
_TILT = ("inverse_temperature", "gamma")


def draw_sweep(
    output: Path,
    sweep: SweepConfig,
    trials: Sequence[TrialLine],
    points: Sequence[Point],
    shares: Mapping[str, float],
    cells: Sequence[Cell],
) -> list[Path]:
    """Every figure that trials, their points, importances and screened cells support, into figures/; returns the paths.

    ResultsError when the disk refuses.
    """
    measured = [line for line in trials if line.rungs]
    if not measured:
        return []
    painters = {
        "history": partial(history, sweep, measured),
        "pareto": partial(pareto, sweep, points),
        "importance": partial(importance, sweep, measured, shares),
        "tilt": partial(tilt_map, sweep, measured),
        "screening": partial(screening_map, sweep, cells),
    }
    return draw(painters, output / "figures", SUFFIXES)


def history(sweep: SweepConfig, trials: Sequence[TrialLine]) -> Figure:
    """Quality of each trial in the order of their ends, one colour a budget, and the best so far at the largest budget."""
    name = quality(sweep.objectives)
    figure, axes = subplots(figsize=(6.4, 3.6))
    budgets = sorted({rung["rollouts"] for line in trials for rung in line.rungs})
    for place, rollouts in enumerate(budgets if sweep.rungs else [None]):
        own = [
            (i, rung["objectives"][name]["mean"])
            for i, line in enumerate(trials, start=1)
            for rung in line.rungs
            if rollouts in (None, rung["rollouts"])
        ]
        label = "trial" if rollouts is None else f"{rollouts} rollouts"
        axes.plot(
            *zip(*own, strict=True),
            _MARKERS[place % 12],
            color=_COLOURS[place % 8],
            ms=5,
            label=label,
        )
        if rollouts in (None, budgets[-1]):
            best = OBJECTIVES[name].sign * np.minimum.accumulate(
                [OBJECTIVES[name].sign * value for _, value in own]
            )
            reach = [*(i for i, _ in own), len(trials)]
            axes.step(
                reach,
                [*best, best[-1]],
                where="post",
                color=_COLOURS[place % 8],
                lw=1.2,
                label="best so far",
            )
    axes.set(xlabel="trial, in the order of their ends", ylabel=OBJECTIVES[name].title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def pareto(sweep: SweepConfig, points: Sequence[Point]) -> Figure:
    """Quality against cost, or the first two objectives, one marker a method; steps through those that none beats.

    Steps, because nothing between two of them was measured: that much of x buys that y, until the next one.
    """
    y, x = front_axes(sweep.objectives)[:2]
    figure, axes = subplots(figsize=(6.4, 3.6))
    for place, method in enumerate(sweep.methods):
        own = [(p.means[x], p.means[y]) for p in points if p.parameters["method"] == method]
        if own:
            marker = _MARKERS[place % 12]
            axes.plot(
                *zip(*own, strict=True),
                marker,
                color=_COLOURS[place % 8],
                ms=5,
                alpha=0.8,
                label=method,
            )
    front = sorted((p.means[x], p.means[y]) for p in points if p.on_front)
    joined: dict[str, Any] = (
        {"drawstyle": "steps-post"}
        if len(sweep.objectives) < 3
        else {"linestyle": "none", "marker": "."}
    )
    axes.plot(
        *zip(*front, strict=True), color="black", lw=1.0, zorder=0, label="Pareto front", **joined
    )
    axes.set(xlabel=OBJECTIVES[x].title, ylabel=OBJECTIVES[y].title)
    if x == "nfe":
        _log_axis(axes, [point.means[x] for point in points])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _log_axis(axes: Axes, values: list[float]) -> None:
    """A logarithmic x axis with plain numbers, ticks at a few of the values where these span less than a decade."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    if max(values) < 20 * min(values):
        ticks = np.unique(
            [float(f"{value:.2g}") for value in np.geomspace(min(values), max(values), 4)]
        )
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def importance(
    sweep: SweepConfig, trials: Sequence[TrialLine], found: Mapping[str, float]
) -> Figure | None:
    """fANOVA importances of what all trials have; none where they are too few."""
    if not found:
        return None
    figure, axes = subplots(figsize=(5.6, 0.6 + 0.45 * len(found)))
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color=_COLOURS[0])
    rollouts = trials[0].rungs[0]["rollouts"]
    at = f" at {rollouts} rollouts" if sweep.rungs else ""
    axes.set(
        xlim=(0, 1),
        xlabel=f"share of the variance of {OBJECTIVES[quality(sweep.objectives)].title}{at}",
    )
    return figure


def tilt_map(sweep: SweepConfig, trials: Sequence[TrialLine]) -> Figure | None:
    """Quality over lambda and gamma at the first budget, all methods; None where not both are swept."""
    if not set(_TILT) <= set(sweep.space):
        return None
    held, values = common_values(sweep, trials)
    points = [(float(line.parameters[_TILT[0]]), float(line.parameters[_TILT[1]])) for line in held]
    figure, axes = subplots(figsize=(5.6, 4.0))
    _scatter_or_grid(axes, figure, sweep, points, values)
    return figure


def screening_map(sweep: SweepConfig, cells: Sequence[Cell]) -> Figure | None:
    """Screened quality over lambda and gamma, marked thin where too few walks bear it; None where not both are swept."""
    if not cells or not set(_TILT) <= set(sweep.space):
        return None
    name = quality(sweep.objectives)
    points = [(cell.inverse_temperature, float(cell.gamma or 0.0)) for cell in cells]
    figure, axes = subplots(figsize=(6.0, 4.2))
    thin = [not cell.believable for cell in cells]
    _grid(
        axes,
        figure,
        points,
        [cell.objectives[name]["mean"] for cell in cells],
        OBJECTIVES[name].title,
        thin,
    )
    axes.set_title("screened by re-weighting; thin: too few effective walks", fontsize=9)
    return figure


def _scatter_or_grid(
    axes: Axes,
    figure: Figure,
    sweep: SweepConfig,
    points: list[tuple[float, float]],
    values: list[float],
) -> None:
    name = OBJECTIVES[quality(sweep.objectives)].title
    if all(isinstance(sweep.space[one], list) for one in _TILT):
        cells = sorted(set(points))
        means = [
            float(np.mean([v for p, v in zip(points, values, strict=True) if p == cell]))
            for cell in cells
        ]
        _grid(axes, figure, cells, means, name, [False] * len(cells))
        return
    drawn = axes.scatter(
        *zip(*points, strict=True), c=values, cmap="viridis", s=60, edgecolor="black", lw=0.4
    )
    for one, label in zip(_TILT, ("x", "y"), strict=True):
        domain = sweep.space[one]
        if not isinstance(domain, list) and domain.log:
            axes.set(**{f"{label}scale": "log"})
            getattr(axes, f"{label}axis").set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:g}")
            )
    axes.set(xlabel="λ (inverse temperature)", ylabel="γ (weight of the spectral term)")
    figure.colorbar(drawn, ax=axes, label=name)


def _grid(
    axes: Axes,
    figure: Figure,
    points: list[tuple[float, float]],
    values: list[float],
    title: str,
    thin: list[bool],
) -> None:
    """A heat map with a value in every cell that was measured."""
    columns, rows = (sorted({point[axis] for point in points}) for axis in (0, 1))
    table = np.full((len(rows), len(columns)), np.nan)
    drawn = axes.imshow(
        table, cmap="viridis", aspect="auto", origin="lower", vmin=min(values), vmax=max(values)
    )
    middle = (min(values) + max(values)) / 2
    for (x, y), value, is_thin in zip(points, values, thin, strict=True):
        row = rows.index(y)
        column = columns.index(x)
        table[row, column] = value
        colour = "white" if value < middle else "black"
        text = f"{value:#.3g}\nthin" if is_thin else f"{value:#.3g}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    drawn.set_data(table)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), [f"{value:.3g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:.3g}" for value in rows])
    axes.set(xlabel="λ (inverse temperature)", ylabel="γ (weight of the spectral term)")
    figure.colorbar(drawn, ax=axes, label=title)
