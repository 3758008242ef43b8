"""value_error.json: mean |v - V| by depth of tree methods on a toy whose V is exact, and its part of a report.

See docs/concepts/exactness.md#toys, docs/guides/evaluate.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdt_dist.errors import ResultsError
from sdt_dist.files import write_text
from sdt_dist.report.blocks import Grid, Picture, Row, Section, by_rows, number_cells

VALUE_ERROR = "value_error.json"
Curves = dict[str, dict[int, float]]


@dataclass(frozen=True, slots=True)
class ValueErrors:
    """What was searched, in words, and {label: {depth: mean |v - V|}}."""

    title: str
    curves: Curves

    def save(self, directory: Path) -> Path:
        """Write value_error.json. ResultsError when the disk refuses."""
        write_text(
            directory / VALUE_ERROR,
            json.dumps({"title": self.title, "curves": self.curves}, indent=1),
        )
        return directory / VALUE_ERROR

    @classmethod
    def load(cls, directory: Path) -> ValueErrors | None:
        """What `save` wrote; None where there is none. ResultsError for a damaged file."""
        path = directory / VALUE_ERROR
        if not path.is_file():
            return None
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            curves = {
                str(k): {int(d): float(e) for d, e in v.items()} for k, v in read["curves"].items()
            }
            return cls(str(read["title"]), curves)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResultsError(
                f"results: {path} is damaged ({error}); make it again with benchmarks.exactness."
            ) from error


def value_error_section(errors: ValueErrors, key: str, run: str, stem: Path) -> Section:
    """The curves as a picture, which was drawn under `stem`, and as a table."""
    depths = sorted({depth for curve in errors.curves.values() for depth in curve})
    columns = [
        number_cells(f"depth {d}", [curve.get(d) for curve in errors.curves.values()])
        for d in depths
    ]
    rows = [
        Row(label, row, run, label)
        for label, row in zip(errors.curves, by_rows(columns), strict=True)
    ]
    caption = f"Mean |v − V| over the nodes of a tree at each depth, where V is exact: {errors.title}. Depth 0 is the root."
    grid = Grid("value_error", "method", [f"depth {d}" for d in depths], rows)
    return Section(f"{run}: value error against depth", key, [Picture(stem, caption), grid])
