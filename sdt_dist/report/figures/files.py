"""Figures as files: one style for all, every format, and what the disk refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sdt_dist.files import replace_file

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
}


def image_suffixes() -> list[str]:
    """Endings of the file names that a figure can be written to."""
    return sorted(f".{kind}" for kind in Figure().canvas.get_supported_filetypes())


def draw(
    painters: Mapping[str, Callable[[], Figure | None]], folder: Path, suffixes: Sequence[str]
) -> list[Path]:
    """Draw figures by name in one style; returns the paths of the first suffix. ResultsError when the disk refuses."""
    written = []
    with matplotlib.rc_context(STYLE):
        for name, painter in painters.items():
            figure = painter()
            if figure is not None:
                save_figure(figure, folder / name, suffixes)
                written.append(folder / f"{name}{suffixes[0]}")
    return written


def save_figure(figure: Figure, stem: Path, suffixes: Sequence[str] = (".png",)) -> None:
    """Write a figure in every format. ResultsError when the disk refuses."""
    for suffix in suffixes:
        kind = suffix.removeprefix(".").lower()
        write = partial(figure.savefig, format=kind)
        replace_file(stem.with_name(stem.name + suffix), write)
