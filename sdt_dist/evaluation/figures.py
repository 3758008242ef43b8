"""Figures of a run, drawn from its result files only: every point was measured (SPEC section 8)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.evaluation.results import Line, ResultLog, read_problems
from sdt_dist.metrics.spectrum import power_spectrum, reference_spectrum
from sdt_dist.search.result import SearchResult

Lines = dict[str, dict[int, Line]]
_ALIGNED = ("s_adt", "residual_ts", "snis", "smc", "maxent_ts", "dts")
_COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#000000",
    "#8C6BB1",
    "#8B4513",
    "#666666",
]
_MARKERS = "osD^vPX*<>ph"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
}


class Run:
    """The files of one run, read once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.problems = {problem.index: problem for problem in read_problems(directory)}
        self.lines: Lines = {}
        for line in ResultLog(directory).lines:
            if line["status"] == "ok":
                self.lines.setdefault(line["label"], {})[line["problem"]] = line
        self.summary = json.loads((directory / "summary.json").read_text())
        self.truth = json.loads((directory / "truth.json").read_text())

    @property
    def base(self) -> str | None:
        return "sample" if "sample" in self.lines else None

    @property
    def aligned(self) -> str | None:
        """The label shown as "aligned": the first tree or particle sampler of the run."""
        return next((label for name in _ALIGNED for label in self.lines if label == name), None)


def draw_all(directory: Path) -> list[Path]:
    """Draw every figure that the run's files support into figures/; returns the paths."""
    run, folder = Run(directory), directory / "figures"
    folder.mkdir(exist_ok=True)
    painters: dict[str, Callable[[Run], Figure | None]] = {
        "quality_cost": quality_against_cost,
        "rewards": reward_distributions,
        "spectra": spectra,
        "fans": fans,
        "diversity": diversity_against_reward,
        "log_z": log_z_and_ess,
    }
    written = []
    with plt.rc_context(_STYLE):
        for name, painter in painters.items():
            figure = painter(run)
            if figure is not None:
                figure.savefig(folder / f"{name}.png")
                plt.close(figure)
                written.append(folder / f"{name}.png")
    return written


def _points(axes: Axes, run: Run, x: str, y: str) -> None:
    """One labelled marker with both intervals a method that has both measures."""
    shown = [label for label in run.summary if x in run.summary[label] and y in run.summary[label]]
    for i, label in enumerate(shown):
        across, up = run.summary[label][x], run.summary[label][y]
        axes.errorbar(
            across["mean"],
            up["mean"],
            xerr=_error(across),
            yerr=_error(up),
            fmt=_MARKERS[i % len(_MARKERS)],
            color=_COLOURS[i % len(_COLOURS)],
            capsize=2,
            markersize=6,
            label=label,
        )


def _error(found: dict[str, float]) -> list[list[float]]:
    return [[max(found["mean"] - found["low"], 0.0)], [max(found["high"] - found["mean"], 0.0)]]


def quality_against_cost(run: Run) -> Figure:
    """CRPS against nfe and against wall time, with 95% intervals."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axes, x, title in zip(panels, ("nfe", "wall_s"), ("NFE per problem", "seconds per problem"), strict=True):
        _points(axes, run, x, "crps")
        axes.set_xscale("log")
        axes.set_xlabel(title)
    panels[0].set_ylabel("CRPS (lower is better)")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle("Quality against cost: mean over problems, 95% bootstrap intervals")
    return figure


def reward_distributions(run: Run) -> Figure:
    """Rewards of all returned samples by method."""
    labels = list(run.lines)
    values = [[r for line in run.lines[label].values() for r in line["rewards"]] for label in labels]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(labels) + 1.4))
    boxes = axes.boxplot(values, orientation="horizontal", showfliers=False, patch_artist=True, widths=0.6)
    for i, box in enumerate(boxes["boxes"]):
        box.set(facecolor=_COLOURS[i % len(_COLOURS)], alpha=0.55)
    for median in boxes["medians"]:
        median.set(color="black")
    axes.set_yticks(range(1, len(labels) + 1), labels)
    axes.invert_yaxis()
    axes.set_xlabel("reward of returned samples (right is better; box: quartiles, whiskers: 1.5 IQR)")
    return figure


def _mean_spectrum(run: Run, pick: Callable[[ForecastProblem], np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
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
    if run.base is None:
        return None

    def samples(label: str) -> Callable[[ForecastProblem], np.ndarray | None]:
        lines = run.lines[label]
        return lambda p: np.array(lines[p.index]["samples"]) if p.index in lines else None

    def mean_of(label: str) -> Callable[[ForecastProblem], np.ndarray | None]:
        lines = run.lines[label]
        return lambda p: np.array(lines[p.index]["samples"]).mean(axis=0) if p.index in lines else None

    curves = [
        ("history", lambda p: p.history, "#000000", "-"),
        ("true future", lambda p: p.truth, "#666666", "--"),
        ("base samples", samples(run.base), _COLOURS[1], "-"),
    ]
    if run.aligned is not None:
        curves.append((f"aligned samples ({run.aligned})", samples(run.aligned), _COLOURS[0], "-"))
    curves.append(("mean of base samples", mean_of(run.base), _COLOURS[1], ":"))
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for label, pick, colour, style in curves:
        axes.semilogy(*_mean_spectrum(run, pick), style, color=colour, label=label, linewidth=1.8)
    axes.set_xlabel("frequency (1 = Nyquist)")
    axes.set_ylabel("power (standardised, geometric mean)")
    axes.set_title("Spectra: averaging forecasts removes their texture")
    axes.legend(frameon=False, fontsize=8)
    return figure


def fans(run: Run) -> Figure | None:
    """Fan charts of up to four problems, base above aligned."""
    rows = [label for label in (run.base, run.aligned) if label is not None]
    if not rows:
        return None
    indices = sorted(run.problems)
    chosen = [indices[i] for i in np.linspace(0, len(indices) - 1, min(4, len(indices))).round().astype(int)]
    figure, grid = plt.subplots(
        len(rows), len(chosen), figsize=(3.2 * len(chosen), 2.5 * len(rows)), squeeze=False, sharex="col", sharey="col"
    )
    for column, index in enumerate(chosen):
        problem = run.problems[index]
        for row, label in enumerate(rows):
            if index in run.lines[label]:
                samples = np.array(run.lines[label][index]["samples"])
                _fan(grid[row, column], problem.history, samples, problem.truth)
            grid[row, column].set_title(f"{problem.name}: {label}", fontsize=8)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def _fan(axes: Axes, history: np.ndarray, samples: np.ndarray, truth: np.ndarray | None) -> None:
    horizon = samples.shape[1]
    tail = history[-2 * horizon :]
    future = np.arange(horizon)
    axes.plot(np.arange(-len(tail), 0), tail, color="black", linewidth=0.9, label="history")
    for low, high, alpha in ((10, 90, 0.25), (25, 75, 0.35)):
        edges = np.percentile(samples, [low, high], axis=0)
        axes.fill_between(future, *edges, color=_COLOURS[0], alpha=alpha, linewidth=0, label=f"{low}–{high}%")
    axes.plot(future, np.median(samples, axis=0), color=_COLOURS[0], linewidth=1.2, label="median")
    axes.plot(future, samples[0], color=_COLOURS[4], linewidth=0.7, label="one sample")
    if truth is not None:
        axes.plot(future, truth, color="#444444", linestyle="--", linewidth=1.0, label="truth")


def fan_chart_file(history: np.ndarray, result: SearchResult, path: Path, *, name: str, season: int | None) -> None:
    """One forecast as a fan chart, with the seasonal-naive line where a season is given."""
    samples = np.stack([sample.series for sample in result.samples])  # type: ignore[misc]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(8, 3.6))
        _fan(axes, history, samples, None)
        if season is not None and season <= len(history):
            naive = history[len(history) - season + np.arange(samples.shape[1]) % season]
            axes.plot(naive, color="#999999", linestyle=":", label=f"last season ({season})")
        axes.set_title(f"{name}: {samples.shape[1]} steps, {len(samples)} samples by {result.method}")
        axes.set_xlabel("steps from now")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path)
        plt.close(figure)


def diversity_against_reward(run: Run) -> Figure:
    """Distinct returned samples against their mean reward."""
    figure, axes = plt.subplots(figsize=(6, 3.8))
    _points(axes, run, "reward_mean", "distinct_samples")
    axes.set_xlabel("mean reward (right is better)")
    axes.set_ylabel("distinct samples (higher is more diverse)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def log_z_and_ess(run: Run) -> Figure | None:
    """ESS and the stated error of log Z by method."""
    labels = [label for label in run.summary if "ess" in run.summary[label] and "log_z" in run.summary[label]]
    if not labels:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 0.4 * len(labels) + 1.5), sharey=True)
    for axes, key, title in zip(
        panels, ("ess", "log_z_error"), ("ESS (right is better)", "stated s.e. of log Z (left is better)"), strict=True
    ):
        for i, label in enumerate(labels):
            found = run.summary[label].get(key)
            if found is not None:
                axes.errorbar(found["mean"], i, xerr=_error(found), fmt="o", color=_COLOURS[i % 10], capsize=3)
        axes.set_xlabel(title)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure
