"""What figures of a run have in common: a canvas, colours, intervals, legends and axes.

It must not know what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#6A3D9A",
    "#8B4513",
    "#7F7F7F",
    "#B2B200",
    "#E7298A",
    "#1B2A5C",
    "#7FC97F",
    "#A50026",
]
_MARKERS = "osD^vPX*<>ph"


def subplots(
    num_rows: int = 1,
    num_columns: int = 1,
    *,
    figsize: tuple[float, float],
    dpi: float | None = None,
    layout: Any = None,
    **grid: Any,
) -> tuple[Figure, Any]:
    """A figure of this size (inches) and its axes; `grid` is what `Figure.subplots` takes besides.

    pyplot would choose a backend for the whole process, which is the user's choice, and keep the
    figure until it is closed.
    """
    figure = Figure(figsize=figsize, dpi=dpi, layout=layout)
    return figure, figure.subplots(num_rows, num_columns, **grid)


def style_of(place: int) -> dict[str, Any]:
    """Colour and marker of the so manieth thing of a figure, for `errorbar`."""
    return {"color": COLOURS[place % len(COLOURS)], "fmt": _MARKERS[place % len(_MARKERS)]}


def reach(found: dict[str, float]) -> list[list[float]]:
    """How far an interval goes to either side of its mean, for `errorbar`."""
    return [[max(found["mean"] - found["low"], 0.0)], [max(found["high"] - found["mean"], 0.0)]]


def point(axes: Axes, x: Any, y: Any, place: int, **bars: Any) -> Any:
    """A marker with pale intervals; returns the marker."""
    found = axes.errorbar(
        x, y, capsize=2, markersize=8, markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.0, **style_of(place),
        **bars,
    )  # fmt: skip
    for part in (*found[1], *found[2]):
        part.set_alpha(0.45)
    return found[0]


def legend(axes: Axes, *others: Axes) -> None:
    """Every name of these panels once, beside the first."""
    panels = (*others, axes)
    found = dict(
        pair
        for panel in panels
        for pair in zip(*panel.get_legend_handles_labels()[::-1], strict=True)
    )
    axes.legend(
        found.values(),
        found.keys(),
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )


def log_axis(axes: Axes) -> None:
    """A logarithmic x axis with few, plain numbers."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = (
        LogLocator(subs=(1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0))
        if high / low > 6
        else MaxNLocator(5)
    )
    axes.xaxis.set_major_locator(few)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def values_axis(axes: Axes, values: Iterable[float]) -> None:
    """An x axis with ticks at these values alone, logarithmic where they span more than a factor of 10."""
    ticks = sorted(values)
    if ticks[0] > 0 and ticks[-1] > 10 * ticks[0]:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
