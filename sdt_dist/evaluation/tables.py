"""Tables of a run as Markdown: means, intervals, and comparisons with plain sampling on the same problems.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sdt_dist.metrics.aggregate import paired_difference, ratio_of_means

Row = dict[str, float]
Summary = dict[str, dict[str, dict[str, float]]]
Table = dict[str, dict[int, Row]]
BASE = "sample"


class Column(NamedTuple):
    """A metric's name in summary.json, its headings in Markdown and in a terminal, and which values are good."""

    metric: str
    title: str
    short: str
    better: str


COLUMNS = [
    Column("crps", "CRPS", "CRPS", "lower"),
    Column("wql", "WQL", "WQL", "lower"),
    Column("mase", "MASE", "MASE", "lower"),
    Column("coverage_80", "80% coverage", "cov80", "near .80"),
    Column("spec_w1", "Spec-W1 (L)", "specW1", "near the truth's"),
    Column("spec_w1_half", "Spec-W1 (L/2)", "specW1/2", "near the truth's"),
    Column("log_l1", "log-L1", "logL1", "near the truth's"),
    Column("reward_mean", "reward", "reward", "higher"),
    Column("reward_best", "best reward", "best", "higher"),
    Column("ess", "ESS", "ESS", "higher"),
    Column("log_z", "log Z", "logZ", "-"),
    Column("distinct_samples", "distinct", "distinct", "higher"),
    Column("nfe", "NFE", "NFE", "matched"),
    Column("wall_s", "s/problem", "s", "lower"),
]
_TITLES = {column.metric: column.title for column in COLUMNS}
_INTERVALS = ("crps", "spec_w1", "log_l1")
_SPECTRAL_AND_CRPS = ("crps", "spec_w1", "spec_w1_half", "log_l1")


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


def to_markdown(summary: Summary, truth: dict[str, Any], table: Table) -> str:
    """The table of means with the truth's own spectra below it, intervals, and comparisons with `sample`."""
    known: dict[str, dict[str, float]] = truth["summary"]
    shown = [column for column in COLUMNS if any(column.metric in row for row in summary.values())]
    rows = {label: [cell(summary, label, column.metric) for column in shown] for label in summary}
    rows["*true future*"] = [
        number(known[c.metric]["mean"]) if c.metric in known else "" for c in shown
    ]
    problems = len({index for found in table.values() for index in found})
    parts = [
        _grid([f"{column.title} ({column.better})" for column in shown], rows),
        f"Means over {problems} problems; intervals of all metrics are in summary.json. `greedy` and `sample` are reference "
        "lines outside the matched budget.",
        "### 95% intervals",
        _intervals(summary, known),
        *_compared(table),
    ]
    return "\n\n".join(parts) + "\n"


def _grid(titles: list[str], rows: dict[str, list[str]]) -> str:
    lines = ["| method | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    return "\n".join(
        lines + [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()]
    )


def _intervals(summary: Summary, truth: dict[str, dict[str, float]]) -> str:
    """Mean [low, high] of the main metrics: 95% bootstrap over problems."""

    def cells(found: dict[str, dict[str, float]]) -> list[str]:
        return [_interval(found[metric]) if metric in found else "–" for metric in _INTERVALS]

    rows = {label: cells(summary[label]) for label in summary} | {"*true future*": cells(truth)}
    return _grid([_TITLES[metric] for metric in _INTERVALS], rows)


def _interval(found: dict[str, float], sign: str = "") -> str:
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _compared(table: Table) -> list[str]:
    """Ratios of means and mean differences to plain sampling on the same problems; none without a `sample`."""
    if BASE not in table or len(table) < 2:
        return []
    return [
        f"### Compared with `{BASE}`",
        f"Mean divided by the mean of `{BASE}` on the same problems [95% interval]; CRPS is better below 1.",
        _comparison(
            table, _SPECTRAL_AND_CRPS, lambda values, base: _interval(ratio_of_means(values, base))
        ),
        f"Mean of the paired differences to `{BASE}` [95% interval].",
        _comparison(
            table,
            (*_SPECTRAL_AND_CRPS, "reward_mean"),
            lambda values, base: _interval(paired_difference(values, base), "+"),
        ),
    ]


def _comparison(
    table: Table, metrics: tuple[str, ...], compare: Callable[[np.ndarray, np.ndarray], str]
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
    return _grid([_TITLES[metric] for metric in metrics], rows)
