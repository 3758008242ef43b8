"""Reports of runs: a table in the terminal, and Markdown with figures for one or more runs (SPEC section 8)."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.figures import draw_all
from sdt_dist.evaluation.results import CONFIG, SAMPLES, write_text
from sdt_dist.evaluation.summary import TABLE, cell, recompute

_CAPTIONS = {
    "quality_cost": "CRPS against cost; every method had the same nfe budget, `greedy` and `sample` are reference lines.",
    "rewards": "Rewards of all returned samples.",
    "spectra": "Mean power spectra. The mean forecast loses power at high frequencies: PSD(E x) <= E PSD(x).",
    "fans": "Forecasts of some problems, base above aligned.",
    "diversity": "Distinct samples against mean reward.",
    "log_z": "Effective sample size and the stated standard error of log Z.",
}
_TERMINAL = ("crps", "mase", "coverage_80", "spec_w1", "log_l1", "reward_mean", "ess", "nfe", "wall_s")


def print_table(directory: Path) -> None:
    """The summary as a terminal table, with what each column means."""
    summary = json.loads((directory / "summary.json").read_text())
    truth = json.loads((directory / "truth.json").read_text())["summary"]
    columns = [column for column in TABLE if column[0] in _TERMINAL]
    table = Table(title="Mean over problems, matched cost (greedy and sample are reference lines)")
    table.add_column("method")
    for _, title, better in columns:
        table.add_column(f"{title}\n({better})", justify="right")
    for label in summary:
        table.add_row(label, *(cell(summary, label, metric) for metric, _, _ in columns))
    table.add_row("true future", *(f"{truth[m]['mean']:.3f}" if m in truth else "" for m, _, _ in columns), style="dim")
    console = Console()
    console.print(table)
    console.print(
        "CRPS, MASE: forecast error. Spec-W1, log-L1: distance of the power spectrum from the history's; a good method\n"
        "comes near the true future's own value. ESS: how many samples the weights are worth. NFE: model evaluations."
    )


def write_report(directories: list[Path], output: Path) -> Path:
    """report.md with tables and figures of one or more runs; numbers are recomputed from their samples.

    ResultsError for a directory without a run.
    """
    parts = ["# Evaluation report", "", f"sdt-dist {version('sdt-dist')}, Python {platform.python_version()}.", ""]
    for number, directory in enumerate(directories):
        if not (directory / SAMPLES).is_file():
            raise ResultsError(f"results: {directory} holds no {SAMPLES}; give directories that `sdt evaluate` wrote.")
        recompute(directory)
        folder = output / f"run_{number}"
        folder.mkdir(parents=True, exist_ok=True)
        parts += [f"## {directory.name}", "", (directory / "summary.md").read_text(), ""]
        for figure in draw_all(directory):
            shutil.copy(figure, folder / figure.name)
            parts += [f"![{figure.stem}](run_{number}/{figure.name})", "", _CAPTIONS[figure.stem], ""]
        parts += ["Configuration:", "", "```yaml", (directory / CONFIG).read_text().strip(), "```", ""]
    write_text(output / "report.md", "\n".join(parts))
    return output / "report.md"
