"""`sdt report`: one HTML page, Markdown and figures from the result files of one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="directories that `sdt evaluate` wrote")],
    output: Annotated[Path, typer.Option(help="directory of the report")] = Path("results/report"),
    reference: Annotated[
        str | None,
        typer.Option(help="method that others are compared with; default: sample, or the first"),
    ] = None,
    problem: Annotated[
        int | None, typer.Option(help="number of the problem to show; default: the first")
    ] = None,
    method: Annotated[str | None, typer.Option(help="method whose search tree to show")] = None,
) -> None:
    """Write report.html, one page with everything in it, from the result files of one or more runs.

    With several runs it says what changed from the first to each other one. report.md and figures/ are written beside it.

    Examples:

      sdt report results/quickstart

      sdt report results/before results/after --output results/report --reference snis

      sdt report results/quickstart --problem 0 --method residual_ts
    """
    from rich.console import Console

    from sdt_dist.evaluation.results import SAMPLES
    from sdt_dist.report.write import write_report

    for run in runs:
        if not (run / SAMPLES).exists():
            _refuse_sweep(run)
    with Console(stderr=True).status("reading") as status:
        page = write_report(
            runs, output, reference=reference, problem=problem, method=method, say=status.update
        )
    print(
        f"report: {page}, also as report.md, with every figure as PNG and PDF in {output / 'figures'}"
    )


def _refuse_sweep(run: Path) -> None:
    """ResultsError for a sweep's directory, which has a report of its own."""
    from sdt_dist.errors import ResultsError
    from sdt_dist.tune.config import PAGE, TRIALS

    if (run / TRIALS).exists():
        raise ResultsError(
            f"results: {run} holds a sweep, whose report is {run / PAGE}; give runs of `sdt evaluate`, such as that of its "
            "heldout.yaml."
        )
