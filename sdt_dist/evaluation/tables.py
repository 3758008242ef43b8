"""Tables of a run as Markdown: means, intervals, and comparisons with plain sampling on the same problems.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sdt_dist.metrics.aggregate import paired_difference, ratio_of_means
from sdt_dist.tasks.task import Column, Row, Task

Summary = dict[str, dict[str, dict[str, float]]]
Table = dict[str, dict[int, Row]]
BASE = "sample"


SEARCH_COLUMNS = (
    Column("reward_mean", "reward", "reward", "higher"),
    Column("reward_best", "best reward", "best", "higher"),
    Column("ess", "ESS", "ESS", "higher"),
    Column("log_z", "log Z", "logZ", "-"),
    Column("distinct_samples", "distinct", "distinct", "higher"),
    Column("nfe", "NFE", "NFE", "matched"),
    Column("wall_s", "s/problem", "s", "lower"),
)


def columns_of(task: Task[Any]) -> tuple[Column, ...]:
    """The columns of a task's tables: its own measures, then what every search has."""
    return (*task.columns, *SEARCH_COLUMNS)


def columns_of_tests(task: Task[Any]) -> list[Column]:
    """The columns of a task's paired tests."""
    by_metric = {column.metric: column for column in columns_of(task)}
    return [by_metric[metric] for metric in task.tested]


def _titles(task: Task[Any]) -> dict[str, str]:
    return {column.metric: column.title for column in columns_of(task)}


def cell(summary: Summary, label: str, metric: str) -> str:
    """A mean as people read it, or a dash."""
    found = summary[label].get(metric)
    return "–" if found is None else number(found["mean"])


def number(value: float) -> str:
    """Three digits after the point, none for large and whole numbers, more for small ones."""
    size = abs(value)
    return (
        f"{value:.0f}"
        if size >= 100 or value == int(value)
        else f"{value:.3g}"
        if size < 0.01
        else f"{value:.3f}"
    )


def to_markdown(task: Task[Any], summary: Summary, truth: dict[str, Any], table: Table) -> str:
    """The table of means with the truth's own measures below it, intervals, and comparisons with `sample`."""
    known: dict[str, dict[str, float]] = truth["summary"]
    shown = [
        column
        for column in columns_of(task)
        if any(column.metric in row for row in summary.values())
    ]
    rows = {label: [cell(summary, label, column.metric) for column in shown] for label in summary}
    rows[f"*{task.truth_name}*"] = [
        number(known[c.metric]["mean"]) if c.metric in known else "" for c in shown
    ]
    problems = len({index for found in table.values() for index in found})
    parts = [
        _grid([f"{column.title} ({column.better})" for column in shown], rows),
        f"Means over {problems} problems; intervals of all metrics are in summary.json. `greedy` and `sample` are reference "
        "lines outside the matched budget.",
        "### 95% intervals",
        _intervals(task, summary, known),
        *_compared(task, table),
    ]
    return "\n\n".join(parts) + "\n"


def _grid(titles: list[str], rows: dict[str, list[str]]) -> str:
    lines = ["| method | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    return "\n".join(
        lines + [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()]
    )


def _intervals(task: Task[Any], summary: Summary, truth: dict[str, dict[str, float]]) -> str:
    """Mean [low, high] of the main metrics: 95% bootstrap over problems."""

    def cells(found: dict[str, dict[str, float]]) -> list[str]:
        return [_interval(found[metric]) if metric in found else "–" for metric in task.intervals]

    rows = {label: cells(summary[label]) for label in summary} | {
        f"*{task.truth_name}*": cells(truth)
    }
    titles = _titles(task)
    return _grid([titles[metric] for metric in task.intervals], rows)


def _interval(found: dict[str, float], sign: str = "") -> str:
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _compared(task: Task[Any], table: Table) -> list[str]:
    """Ratios of means and mean differences to plain sampling on the same problems; none without a `sample`."""
    if BASE not in table or len(table) < 2:
        return []
    return [
        f"### Compared with `{BASE}`",
        f"Mean divided by the mean of `{BASE}` on the same problems [95% interval]; {task.comparison}.",
        _comparison(
            task,
            table,
            task.compared,
            lambda values, base: _interval(ratio_of_means(values, base)),
        ),
        f"Mean of the paired differences to `{BASE}` [95% interval].",
        _comparison(
            task,
            table,
            (*task.compared, "reward_mean"),
            lambda values, base: _interval(paired_difference(values, base), "+"),
        ),
    ]


def _comparison(
    task: Task[Any],
    table: Table,
    metrics: tuple[str, ...],
    compare: Callable[[np.ndarray, np.ndarray], str],
) -> str:
    base = table[BASE]
    rows = {}
    for label in (label for label in table if label != BASE):
        cells = []
        for metric in metrics:
            both = [
                i for i, row in table[label].items() if metric in row and metric in base.get(i, {})
            ]
            values, others = (
                np.array([found[i][metric] for i in both]) for found in (table[label], base)
            )
            cells.append(compare(values, others) if both and others.any() else "–")
        rows[label] = cells
    titles = _titles(task)
    return _grid([titles[metric] for metric in metrics], rows)
