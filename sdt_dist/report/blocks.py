"""What a report is made of: sections of texts, tables, pictures, code and trees, which Markdown and HTML both render.

A number is kept as it is and once as text; a cell says which run, method and metric it belongs to. It must not know
files or formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

DIGITS = 3  # of the largest number in a column; the others have as many decimals


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry: its text, further lines, the numbers behind it by name, and the metric they are of."""

    text: str
    notes: Sequence[str] = ()
    metric: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    is_strong: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table; `run` and `label` name what its numbers are of."""

    title: str
    cells: Sequence[Cell]
    run: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: `name` is what kind of numbers it holds, `hints` say below each heading which values are good."""

    kind: ClassVar[str] = "grid"
    name: str
    corner: str
    titles: Sequence[str]
    rows: Sequence[Row]
    hints: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """Sentences, one below the other."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure that was written as .png, .pdf and .svg under `stem`."""

    kind: ClassVar[str] = "picture"
    stem: Path
    caption: str


@dataclass(frozen=True, slots=True)
class Code:
    """A file's text, or commands."""

    kind: ClassVar[str] = "code"
    text: str
    language: str = "yaml"


@dataclass(frozen=True, slots=True)
class TreeView:
    """A search tree to click through; `data` is plain JSON, `stem` its drawing for where there is no script."""

    kind: ClassVar[str] = "tree"
    data: dict[str, Any]
    stem: Path
    caption: str


Block = Text | Bullets | Grid | Picture | Code | TreeView


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with blocks and sections of its own."""

    title: str
    anchor: str
    blocks: Sequence[Block] = ()
    parts: Sequence[Section] = ()


def decimals_for(values: Iterable[float]) -> int:
    """Decimals with which the largest of a column's numbers has three digits."""
    largest = max((abs(value) for value in values), default=0.0)
    return 0 if largest == 0 else min(max(DIGITS - 1 - math.floor(math.log10(largest)), 0), 8)


def fixed(value: float, decimals: int, sign: str = "") -> str:
    """A number with so many decimals and thousands apart; zero has no sign."""
    text = f"{value:{sign},.{decimals}f}"
    return text.lstrip("+-") if float(text.replace(",", "")) == 0 else text


def interval_cells(metric: str, column: Sequence[dict[str, float] | None]) -> list[Cell]:
    """A column of means with their intervals below; None is a dash."""
    digits = decimals_for(abs(found["mean"]) for found in column if found is not None)
    return [
        _dash(metric) if found is None else _interval(metric, found, digits) for found in column
    ]


def number_cells(metric: str, column: Sequence[float | None]) -> list[Cell]:
    """A column of plain numbers with three digits each, whole ones whole; None is a dash."""
    return [_dash(metric) if value is None else _number(metric, float(value)) for value in column]


def _number(metric: str, value: float) -> Cell:
    digits = 0 if value.is_integer() else decimals_for([value])
    return Cell(fixed(value, digits), metric=metric, numbers={"mean": value})


def text_cells(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text) for text in texts]


def by_rows(columns: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Columns of cells as rows of cells."""
    return [list(row) for row in zip(*columns, strict=True)]


def _dash(metric: str) -> Cell:
    return Cell("–", metric=metric)


def _interval(metric: str, found: dict[str, float], digits: int) -> Cell:
    text = fixed(found["mean"], digits)
    if found["low"] == found["high"]:
        return Cell(text, metric=metric, numbers=dict(found))
    note = f"[{fixed(found['low'], digits)}, {fixed(found['high'], digits)}]"
    return Cell(text, [note], metric, dict(found))
