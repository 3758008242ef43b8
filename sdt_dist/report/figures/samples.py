"""Figures of a run's samples: rewards, spectra, fan charts, and what their weights are worth.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.metrics.spectrum import MIN_SEGMENT, power_spectrum, reference_spectrum
from sdt_dist.report.figures.axes import COLOURS, legend, reach, subplots
from sdt_dist.report.figures.files import STYLE, save_figure
from sdt_dist.report.figures.run import Run
from sdt_dist.search.result import SearchResult

_LONG = 36  # letters beside a panel
_BASE_COLOUR = COLOURS[1]
_ALIGNED_COLOUR = COLOURS[0]
_SAMPLE_COLOUR = COLOURS[4]
_FAN = (("#CFE3F2", 10, 90), ("#8FBEDD", 25, 75))


def reward_distributions(run: Run) -> Figure:
    """Rewards of all returned samples by method."""
    labels = list(run.lines)
    values = [
        [r for line in run.lines[label].values() for r in line["rewards"]] for label in labels
    ]
    figure, axes = subplots(figsize=(8, 0.34 * len(labels) + 1.4))
    boxes = axes.boxplot(
        values, orientation="horizontal", showfliers=False, patch_artist=True, widths=0.6
    )
    for label, box in zip(labels, boxes["boxes"], strict=True):
        box.set(facecolor=run.style(label)["color"], alpha=0.55)
    for median in boxes["medians"]:
        median.set(color="black")
    axes.set_yticks(range(1, len(labels) + 1), labels)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"reward of returned samples (right is better; box: quartiles, whiskers: 1.5 IQR{run.reward_note})"
    )
    return figure


def _mean_spectrum(
    run: Run, pick: Callable[[ForecastProblem], np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and the geometric mean over problems of what `pick` gives, standardised by (loc, scale)."""
    found = []
    for problem in run.problems.values():
        series = pick(problem)
        if series is not None:
            z = (series - problem.loc) / problem.scale
            segment = max(4, len(problem.truth) // 2)
            if z.ndim == 1 and len(z) > len(problem.truth):
                found.append(reference_spectrum(z, len(problem.truth), segment))
            else:
                found.append(power_spectrum(np.atleast_2d(z), segment)[1].mean(axis=0))
    spectra_ = np.maximum(np.stack(found), 1e-12)
    return np.linspace(0, 1, spectra_.shape[1]), np.exp(np.log(spectra_).mean(axis=0))


def spectra(run: Run) -> Figure | None:
    """Power spectra of history, truth, base and aligned samples, and the collapse of the mean forecast."""
    if run.base is None or run.horizon < MIN_SEGMENT:
        return None

    def samples(label: str) -> Callable[[ForecastProblem], np.ndarray | None]:
        lines = run.lines[label]
        return lambda p: np.array(lines[p.index]["samples"]) if p.index in lines else None

    def mean_of(label: str) -> Callable[[ForecastProblem], np.ndarray | None]:
        lines = run.lines[label]
        return lambda p: (
            np.array(lines[p.index]["samples"]).mean(axis=0) if p.index in lines else None
        )

    curves = [
        ("history", lambda p: p.history, "#000000", "-"),
        ("true future", lambda p: p.truth, "#666666", "--"),
        ("base samples", samples(run.base), _BASE_COLOUR, "-"),
    ]
    if run.aligned is not None:
        curves.append(
            (f"aligned samples ({run.aligned})", samples(run.aligned), _ALIGNED_COLOUR, "-")
        )
    curves.append(("mean of base samples", mean_of(run.base), _BASE_COLOUR, ":"))
    figure, axes = subplots(figsize=(6.5, 4))
    for label, pick, colour, style in curves:
        axes.semilogy(*_mean_spectrum(run, pick), style, color=colour, label=label, linewidth=1.8)
    axes.set_xlabel("frequency (1 = Nyquist)")
    axes.set_ylabel("power (standardised, geometric mean)")
    axes.set_title("Spectra: averaging forecasts removes their texture")
    axes.legend(frameon=False, fontsize=8)
    return figure


def fans(run: Run) -> Figure | None:
    """Fan charts of up to three problems, base above aligned."""
    rows = [label for label in (run.base, run.aligned) if label is not None]
    if not rows:
        return None
    indices = sorted(run.problems)
    chosen = [
        indices[i]
        for i in np.linspace(0, len(indices) - 1, min(3, len(indices))).round().astype(int)
    ]
    figure, grid = subplots(
        len(rows),
        len(chosen),
        figsize=(max(6.5, 3.3 * len(chosen)), 2.7 * len(rows)),
        squeeze=False,
        sharex="col",
        sharey="col",
    )
    for column, index in enumerate(chosen):
        problem = run.problems[index]
        for row, label in enumerate(rows):
            if index in run.lines[label]:
                samples = np.array(run.lines[label][index]["samples"])
                draw_fan(grid[row, column], problem.history, samples, problem.truth)
            grid[row, 0].set_ylabel(label, fontsize=8 if len(label) < _LONG else 6)
        grid[0, column].set_title(problem.name, fontsize=10)
        grid[-1, column].set_xlabel("steps from now")
    found = dict(
        pair
        for axes in grid.flat
        for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True)
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(
        found.values(),
        found.keys(),
        loc="lower center",
        ncols=len(found),
        frameon=False,
        fontsize=9,
    )
    return figure


def draw_fan(
    axes: Axes, history: np.ndarray, samples: np.ndarray, truth: np.ndarray | None
) -> None:
    """Quantile bands, median and one of the samples [S, H] after the end of the history [L], and the truth [H]."""
    horizon = samples.shape[1]
    tail = history[-(3 * horizon // 2) :]
    future = np.arange(horizon)
    axes.plot(np.arange(-len(tail), 0), tail, color="black", linewidth=0.9, label="history")
    for colour, low, high in _FAN:
        edges = np.percentile(samples, [low, high], axis=0)
        axes.fill_between(future, *edges, color=colour, linewidth=0, label=f"{low}–{high}%")
    axes.plot(
        future, np.median(samples, axis=0), color=_ALIGNED_COLOUR, linewidth=1.6, label="median"
    )
    axes.plot(future, samples[0], color=_SAMPLE_COLOUR, linewidth=0.8, label="one sample")
    if truth is not None:
        axes.plot(future, truth, color="#222222", linestyle="--", linewidth=1.2, label="truth")


def fan_chart_file(
    history: np.ndarray, result: SearchResult, path: Path, *, name: str, season: int | None
) -> None:
    """One forecast as a fan chart, with the seasonal-naive line where a season is given. ResultsError as `draw_all`."""
    samples = np.stack([sample.series for sample in result.samples])  # type: ignore[misc]
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots(figsize=(8, 3.6))
        draw_fan(axes, history, samples, None)
        if season is not None and season <= len(history):
            naive = history[len(history) - season + np.arange(samples.shape[1]) % season]
            axes.plot(naive, color="#999999", linestyle=":", label=f"last season ({season})")
        axes.set_title(
            f"{name}: {samples.shape[1]} steps, {len(samples)} samples by {result.method}"
        )
        axes.set_xlabel("steps from now")
        legend(axes)
        save_figure(figure, path.with_suffix(""), [path.suffix])


def log_z_and_ess(run: Run) -> Figure | None:
    """ESS and the stated error of log Z by method."""
    labels = [label for label in run.lines if {"ess", "log_z"} <= run.summary.get(label, {}).keys()]
    if not labels:
        return None
    figure, panels = subplots(1, 2, figsize=(8.5, 0.4 * len(labels) + 1.5), sharey=True)
    for axes, key, title in zip(
        panels,
        ("ess", "log_z_error"),
        ("ESS (right is better)", "stated s.e. of log Z (left is better)"),
        strict=True,
    ):
        for i, label in enumerate(labels):
            found = run.summary[label].get(key)
            if found is not None:
                axes.errorbar(found["mean"], i, xerr=reach(found), capsize=3, **run.style(label))
            else:
                axes.annotate(
                    "none stated",
                    (0.02, i),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=8,
                )
        axes.set_xlabel(title)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure
