"""`sdt report`: Markdown and figures from the result files of one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="directories that `sdt evaluate` wrote")],
    output: Annotated[Path, typer.Option(help="directory of the report")] = Path("results/report"),
) -> None:
    """Write report.md with figures from the result files of one or more runs.

    Example:

      sdt report results/etth1 results/quickstart --output results/report
    """
    from sdt_dist.evaluation.report import write_report

    print(f"report: {write_report(runs, output)}")
