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
    for column in shown:
        digits = _digits(_values(found, column.metric))
        cells = [_cell(column.metric, row.get(column.metric), digits) for row in found.values()]
        columns.append(cells)
    rows = []
    for label, cells in zip(found, by_rows(columns), strict=True):
        rows.append(Row(label, cells, run, label))
    titles = [column.title for column in shown]
    hints = [hint(column) for column in shown]
    return Grid(name, "method", titles, rows, hints)


def _values(found: Differences, metric: str) -> list[Difference]:
    """A metric's differences, of the methods that have it."""
    return [row[metric] for row in found.values() if metric in row]


def _digits(values: list[Difference]) -> int:
    """Decimals that a column's numbers need."""
    numbers = []
    for value in values:
        numbers += [abs(value.low), abs(value.high), abs(value.mean)]
    return decimals_for(numbers)


def hint(column: Column) -> str:
    """Which values of a metric are good, if any are."""
    return "" if column.better in ("", "-") else column.better


def _cell(metric: str, found: Difference | None, digits: int) -> Cell:
    if found is None:
        return Cell("–", metric=metric)
    mean = fixed(found.mean, digits, "+")
    low = fixed(found.low, digits, "+")
    high = fixed(found.high, digits, "+")
    p = probability(found.p)
    p_holm = probability(found.p_holm)
    notes = [f"[{low}, {high}]", f"p {p}, Holm {p_holm}"]
    return Cell(mean, notes, metric, found._asdict(), found.excludes_zero)


def probability(p: float) -> str:
    """A p-value with two digits, from .001 on."""
    return "<.001" if p < 0.001 else f"{p:.2g}"


def in_words(found: Differences, tested: Sequence[Column], than: str) -> list[str]:
    """One sentence a metric that differs by more than its interval, for which methods; and one on all that do not."""
    sentences = []
    unchanged = []
    for column in tested:
        metric = column.metric
        rows = {label: row[metric] for label, row in found.items() if metric in row}
        higher = [label for label, value in rows.items() if value.low > 0]
        lower = [label for label, value in rows.items() if value.high < 0]
        sides = []
        if higher:
            sides.append(f"higher{than} for {_listed(higher, len(found))}")
        if lower:
            sides.append(f"lower{than} for {_listed(lower, len(found))}")
        if sides:
            sentences.append(f"{column.title} (good: {column.better}) is {' and '.join(sides)}.")
        elif rows:
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
