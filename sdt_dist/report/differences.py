"""Paired differences in a report: a table with intervals and tests, the same in words, and what the numbers are.

It must not know files.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdt_dist.evaluation.significance import Difference, Differences
from sdt_dist.report.blocks import Cell, Grid, Row, by_rows, decimals_for, fixed
from sdt_dist.tasks.task import Column

_SIGNIFICANT = 0.05
_MOST_NAMED = 8  # methods in a sentence
_FEW = 10  # problems; percentile bootstrap intervals cover too rarely below


def differences_grid(found: Differences, tested: Sequence[Column], name: str, run: str) -> Grid:
    """A table of paired differences in the tested measures: the mean, its interval, p; in bold where the interval excludes 0."""
    shown = [column for column in tested if any(column.metric in row for row in found.values())]
    columns = []
    for metric in (column.metric for column in shown):
        values = [row[metric] for row in found.values() if metric in row]
        digits = decimals_for(
            abs(x) for value in values for x in (value.low, value.high, value.mean)
        )
        columns.append([_cell(metric, row.get(metric), digits) for row in found.values()])
    rows = [Row(label, row, run, label) for label, row in zip(found, by_rows(columns), strict=True)]
    return Grid(name, "method", [c.title for c in shown], rows, [hint(c) for c in shown])


def hint(column: Column) -> str:
    """Which values of a metric are good, if any are."""
    return "" if column.better in ("", "-") else column.better


def _cell(metric: str, found: Difference | None, digits: int) -> Cell:
    if found is None:
        return Cell("–", metric=metric)
    notes = [
        f"[{fixed(found.low, digits, '+')}, {fixed(found.high, digits, '+')}]",
        f"p {probability(found.p)}, Holm {probability(found.p_holm)}",
    ]
    return Cell(fixed(found.mean, digits, "+"), notes, metric, found._asdict(), found.excludes_zero)


def probability(p: float) -> str:
    """A p-value with two digits, from .001 on."""
    return "<.001" if p < 0.001 else f"{p:.2g}"


def in_words(found: Differences, tested: Sequence[Column], than: str) -> list[str]:
    """One sentence a metric that differs by more than its interval, for which methods; and one on all that do not."""
    sentences = []
    unchanged = []
    for column in tested:
        metric = column.metric
        higher = [label for label, row in found.items() if metric in row and row[metric].low > 0]
        lower = [label for label, row in found.items() if metric in row and row[metric].high < 0]
        named = (("higher", higher), ("lower", lower))
        sides = [f"{side}{than} for {_listed(who, len(found))}" for side, who in named if who]
        if sides:
            sentences.append(f"{column.title} (good: {column.better}) is {' and '.join(sides)}.")
        elif any(metric in row for row in found.values()):
            unchanged.append(column.title)
    if unchanged:
        sentences.append(f"No method differs by more than its interval in {', '.join(unchanged)}.")
    return sentences


def _listed(labels: list[str], total: int) -> str:
    """The names of methods, or how many they are where nobody would read them."""
    if len(labels) > _MOST_NAMED:
        return f"{len(labels)} of {total} (in bold below)"
    return ", ".join(f"`{label}`" for label in labels)


def explain(found: Differences, what: str) -> str:
    """What the numbers of a table of differences are, and how far its tests and intervals can be trusted."""
    values = [value for row in found.values() for value in row.values()]
    num = max(value.num for value in values)
    small = sum(value.p_holm < _SIGNIFICANT for value in values)
    least = 2.0 ** (1 - num)
    parts = [
        f"Mean of {what}, its 95% bootstrap interval (bold: it excludes 0), and p of Wilcoxon's signed-rank test on the pairs, "
        f"before and after Holm's correction for all {len(values)} tests of the table. n = {num} pairs; after the correction "
        f"{small} of the p are below {_SIGNIFICANT:g}."
    ]
    if least * len(values) > _SIGNIFICANT:
        parts.append(
            f"With {num} pairs no p can be below {probability(least)}, so after the correction none can be small."
        )
    if num < _FEW:
        parts.append("Bootstrap intervals over so few problems tend to be too narrow.")
    return " ".join(parts)
