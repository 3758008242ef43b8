"""Accuracy of a forecaster on ETTh1 and M4 Hourly against classical forecasts.

    SDT_DATA_DIR=... python -m benchmarks.forecaster --dataset etth1 --output etth1.json

Workload: ETTh1, all 7 channels, test part, horizon 96, a target every 144 rows (20 windows a channel), z-scored by
its training part; M4 Hourly, 414 series, their 48 test values, each z-scored by its own history. Context 512, season
24. The forecaster draws `sample` (its prior); seasonal-naive with residuals and AutoETS (on an even subsample) draw
as many. CRPS, MASE and coverage are means over problems, WQL is a ratio of sums. Intervals are 95% bootstraps over
problems; on ETTh1 over windows in time, whose 7 channels move together. AutoETS often finds no season in 512 hourly
values, so beating it alone shows little. A directory is held to the zero-shot targets and to the fine-tuned ones.

Beside other jobs set OMP_NUM_THREADS=1: threads that spin for each other on taken cores decode far slower than one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sdt_dist.data.problems import ForecastProblem, load_problems
from sdt_dist.evaluation.baselines import (
    seasonal_naive,
    seasonal_naive_residuals,
    statsforecast_samples,
)
from sdt_dist.files import write_text
from sdt_dist.metrics.aggregate import ratio_of_means, ratio_of_sums
from sdt_dist.metrics.forecast import coverage_80, crps, mase, quantile_loss

# ROWS: samples decoded together
CONTEXT = 512
SEED = 0
ROWS = 256
HORIZON = {"etth1": 96, "m4_hourly": 48}
STRIDE = {"etth1": 144, "m4_hourly": 48}
MODEL = "model"
NAIVE = "snaive"
RESIDUALS = "snaive+residuals"
METRICS = ("crps", "wql", "mase", "coverage_80")

Interval = dict[str, float]
Table = dict[str, dict[str, Interval]]


class Target(NamedTuple):
    """A measure of the model, over a baseline's where one is named, and the range that it is to lie in."""

    kind: str
    dataset: str
    metric: str
    baseline: str | None
    channel: str | None
    at_least: float
    at_most: float


TARGETS = (
    Target("zero-shot", "etth1", "crps", NAIVE, None, 0.0, 0.80),
    Target("zero-shot", "etth1", "crps", RESIDUALS, "OT", 0.0, 0.90),
    Target("zero-shot", "etth1", "coverage_80", None, None, 0.70, 0.88),
    Target("zero-shot", "m4_hourly", "wql", NAIVE, None, 0.0, 0.85),
    Target("fine-tuned", "etth1", "crps", RESIDUALS, None, 0.0, 0.95),
    Target("fine-tuned", "etth1", "mase", NAIVE, None, 0.0, 1.10),
)


class Scores:
    """Measures of every forecast by label, [N] each with NaN where a forecast was not made, and their aggregates."""

    def __init__(self, dataset: str, problems: list[ForecastProblem]) -> None:
        names = [problem.name.split("@") for problem in problems]
        self.problems = problems
        self.values = dict[str, dict[str, np.ndarray]]()
        self.channels = np.array([name for name, _ in names])
        self.blocks = np.unique([names[i][1] if dataset == "etth1" else str(i) for i in range(len(names))],
                                return_inverse=True)[1]  # fmt: skip

    def add(self, label: str, row: int, samples: np.ndarray) -> None:
        """Score the samples [S, H] of problem `row`."""
        p = self.problems[row]
        found = {
            "crps": crps((samples - p.loc) / p.scale, (p.truth - p.loc) / p.scale),
            "wql": quantile_loss(samples, p.truth),
            "wql_scale": float(np.abs(p.truth).sum()),
            "mase": mase(samples, p.truth, p.history, p.season),
            "coverage_80": coverage_80(samples, p.truth),
        }
        for metric, value in found.items():
            columns = self.values.setdefault(label, {})
            columns.setdefault(metric, np.full(len(self.problems), np.nan))[row] = value

    def rows(self, label: str) -> np.ndarray:
        """The problems [n] that a forecast was made for."""
        return np.flatnonzero(np.isfinite(self.values[label]["crps"]))

    def mean(self, label: str, metric: str, rows: np.ndarray) -> Interval:
        """A measure over `rows` with its interval."""
        weights = (
            self.values[label]["wql_scale"] if metric == "wql" else np.ones(len(self.problems))
        )
        return ratio_of_sums(
            self._sums(self.values[label][metric], rows), self._sums(weights, rows)
        )

    def ratio(self, label: str, metric: str, rows: np.ndarray) -> Interval:
        """A measure of the model over that of `label`, over the same `rows`, with its interval."""
        model, other = (self._sums(self.values[name][metric], rows) for name in (MODEL, label))
        return ratio_of_means(model, other)

    def records(self) -> list[dict[str, Any]]:
        """Every problem's name and measures, by label."""
        return [
            {"name": problem.name}
            | {
                n: {m: v[row] for m, v in self.values[n].items()}
                for n in self.values
                if row in self.rows(n)
            }
            for row, problem in enumerate(self.problems)
        ]

    def _sums(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Sums over the problems of a block, the unit of the bootstrap."""
        blocks = np.unique(self.blocks[rows], return_inverse=True)[1]
        return np.bincount(blocks, values[rows])


def forecast_with_model(
    spec: str, scores: Scores, horizon: int, num_samples: int, tick: Callable[[], None]
) -> float:
    """Score the forecaster on every problem; tokens per second, prompts included in the time."""
    from sdt_dist.models.loading import load_model
    from sdt_dist.rewards.base import as_reward
    from sdt_dist.search.api import run_searches
    from sdt_dist.search.session import SearchProblem

    process = load_model(spec).process(horizon)
    reward = as_reward(lambda series: np.zeros(len(series)), "series")
    searches = [
        SearchProblem(row, process.root(p.history), reward) for row, p in enumerate(scores.problems)
    ]
    begin = time.perf_counter()
    runs = run_searches(process, searches, method="sample", options={"num_samples": num_samples}, seed=SEED,
                        in_flight=max(1, ROWS // num_samples))  # fmt: skip
    for row, outcome in runs:
        if isinstance(outcome, Exception):
            raise outcome
        scores.add(MODEL, row, np.stack([sample.series for sample in outcome.samples]))
        tick()
    return len(searches) * num_samples * horizon / (time.perf_counter() - begin)


def evaluate(options: argparse.Namespace, scores: Scores) -> float:
    """Make and score every forecast; the model's tokens per second."""
    count = len(scores.problems)
    some = np.linspace(0, count - 1, min(options.classical_problems, count)).round().astype(int)
    classical = [
        *(["AutoETS"] if len(some) else []),
        *(["AutoARIMA"] if options.arima and len(some) else []),
    ]
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)
    ) as progress:
        task = progress.add_task(MODEL, total=count)
        speed = forecast_with_model(
            options.model,
            scores,
            HORIZON[options.dataset],
            options.num_samples,
            lambda: progress.advance(task),
        )
        for row in progress.track(range(count), description="seasonal-naive"):
            scores.add(NAIVE, row, seasonal_naive(scores.problems[row]))
            scores.add(
                RESIDUALS,
                row,
                seasonal_naive_residuals(scores.problems[row], options.num_samples, SEED),
            )
        for name in classical:
            for row in progress.track(some, description=name):
                samples = statsforecast_samples(
                    scores.problems[row], name, options.num_samples, SEED
                )
                scores.add(name, int(row), samples)
    return speed


def tables(scores: Scores, rows: np.ndarray, labels: list[str]) -> tuple[Table, Table]:
    """Measures by label, and the model's over each baseline's, over the same problems."""
    means = {
        label: {metric: scores.mean(label, metric, rows) for metric in METRICS} for label in labels
    }
    ratios = {
        label: {m: scores.ratio(label, m, rows) for m in METRICS[:3]}
        for label in labels
        if label != MODEL
    }
    return means, ratios


def show(title: str, table: Table) -> None:
    """One line a label; the coverage of a point forecast means nothing."""
    metrics = list(next(iter(table.values())))
    print(f"\n{title:<18}" + "".join(f"{metric:>23}" for metric in metrics))
    for label, cells in table.items():
        texts = [
            "-"
            if (label, metric) == (NAIVE, "coverage_80")
            else f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]"
            for metric, c in cells.items()
        ]
        print(f"{label:<18}" + "".join(f"{text:>23}" for text in texts))


def report(scores: Scores) -> dict[str, object]:
    """Print the tables over all problems and over those of each fitted baseline; returns what they hold."""
    found: dict[str, object] = {}
    for name in [label for label in scores.values if label not in (MODEL, NAIVE)]:
        rows = scores.rows(name)
        extra = [] if name == RESIDUALS else [name]
        means, ratios = tables(scores, rows, [MODEL, NAIVE, RESIDUALS, *extra])
        print(f"\n{len(rows)} problems" + (f" that {name} was fitted to" if extra else ""))
        show("", means)
        show("model over", ratios)
        found[name if extra else "all"] = {
            "problems": rows.tolist(),
            "means": means,
            "model_over": ratios,
        }
    return found


def report_channels(scores: Scores) -> Table:
    """Print CRPS by channel."""
    rows = {
        str(channel): np.flatnonzero(scores.channels == channel)
        for channel in dict.fromkeys(scores.channels)
    }
    labels = (MODEL, NAIVE, RESIDUALS)
    found = {
        name: {label: scores.mean(label, "crps", chosen) for label in labels}
        for name, chosen in rows.items()
    }
    show("CRPS by channel", found)
    return found


def report_targets(options: argparse.Namespace, scores: Scores) -> list[dict[str, object]]:
    """Print each target of the dataset, met or not met by the mean."""
    kinds = ("zero-shot", "fine-tuned") if Path(options.model).is_dir() else ("zero-shot",)
    found = []
    print("\ntargets")
    for target in TARGETS:
        rows = (
            np.flatnonzero(scores.channels == target.channel)
            if target.channel
            else np.arange(len(scores.problems))
        )
        if target.dataset != options.dataset or target.kind not in kinds or not len(rows):
            continue
        measure = scores.mean if target.baseline is None else scores.ratio
        value = measure(target.baseline or MODEL, target.metric, rows)
        met = target.at_least <= value["mean"] <= target.at_most
        name = " ".join(
            filter(
                None, [target.metric, target.channel, target.baseline and f"over {target.baseline}"]
            )
        )
        print(
            f"{target.kind:<11}{name:<32}{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]  wanted "
            f"{target.at_least:.2f} to {target.at_most:.2f}  {'met' if met else 'NOT met'}  ({len(rows)} problems)"
        )
        found.append(target._asdict() | value | {"num_problems": len(rows), "met": met})
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forecaster", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--model", default="bundled", help="bundled, or a directory of a forecaster"
    )
    parser.add_argument("--dataset", choices=sorted(HORIZON), default="etth1")
    parser.add_argument("--num-problems", type=int, help="an even choice of them (default: all)")
    parser.add_argument(
        "--num-samples",
        type=int,
        default=60,
        help="samples of every forecast but the point forecast",
    )
    parser.add_argument("--stride", type=int, help="rows between targets of ETTh1 (default: 144)")
    parser.add_argument(
        "--classical-problems", type=int, default=28, help="problems for AutoETS; 0 leaves it out"
    )
    parser.add_argument(
        "--arima", action="store_true", help="AutoARIMA too, half a minute a problem"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file of all tables and of every problem's measures"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    horizon = HORIZON[options.dataset]
    stride = options.stride or STRIDE[options.dataset]
    problems = load_problems(
        options.dataset,
        horizon=horizon,
        context_length=CONTEXT,
        stride=stride,
        num_problems=options.num_problems,
    )
    print(
        f"{options.dataset}: {len(problems)} problems, context {CONTEXT}, horizon {horizon}, stride {stride}; "
        f"{options.model}: {options.num_samples} samples, seed {SEED}"
    )
    scores = Scores(options.dataset, problems)
    speed = evaluate(options, scores)
    threads = torch.get_num_threads()
    print(f"{speed:,.0f} tokens/s with {threads} threads on {os.cpu_count()} cores")
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
    }
    result: dict[str, object] = {
        "settings": settings
        | {"context_length": CONTEXT, "horizon": horizon, "stride": stride, "seed": SEED},
        "tokens_per_s": speed,
        "num_threads": threads,
        "tables": report(scores),
    }
    if options.dataset == "etth1":
        result["crps_by_channel"] = report_channels(scores)
    result["targets"] = report_targets(options, scores)
    result["problems"] = scores.records()
    if options.output is not None:
        write_text(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
