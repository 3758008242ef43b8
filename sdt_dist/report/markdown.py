"""A report's sections as Markdown; pictures are linked files. It must not know where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sdt_dist.report.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Grid,
    Picture,
    Section,
    Text,
    TreeView,
)


def to_markdown(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The text of report.md, which lies in `folder`."""
    parts = [f"# {title}"]
    for section in sections:
        parts += _section(section, 2, folder)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, level: int, folder: Path) -> Iterator[str]:
    if section.title:
        yield f"{'#' * level} {section.title}"
    for block in section.blocks:
        yield from _block(block, folder)
    for part in section.parts:
        yield from _section(part, level + 1, folder)


def _block(block: Block, folder: Path) -> Iterator[str]:
    if isinstance(block, Text):
        yield block.text
    elif isinstance(block, Bullets):
        yield "\n".join(f"- {item}" for item in block.items)
    elif isinstance(block, Code):
        yield f"```{block.language}\n{block.text.strip()}\n```"
    elif isinstance(block, (Picture, TreeView)):
        path = block.stem.relative_to(folder).as_posix()
        yield f"![{block.stem.name}]({path}.png)"
        yield f"{block.caption} ([PDF]({path}.pdf))"
    elif isinstance(block, Grid):
        yield _grid(block)


def _grid(grid: Grid) -> str:
    hints = grid.hints or [""] * len(grid.titles)
    titles = [
        f"{title} ({hint})" if hint else title
        for title, hint in zip(grid.titles, hints, strict=True)
    ]
    lines = [[grid.corner, *titles], ["---", *["---:"] * len(titles)]]
    lines += [[row.title, *map(_cell, row.cells)] for row in grid.rows]
    return "\n".join(
        "| " + " | ".join(entry.replace("|", "\\|") for entry in line) + " |" for line in lines
    )


def _cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.is_strong else cell.text
    return " ".join([text, *cell.notes])
