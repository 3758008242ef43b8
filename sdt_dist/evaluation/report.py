"""Reports of runs: a table in the terminal, and Markdown with figures for one or more runs (SPEC section 8)."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.figures import draw_all
from sdt_dist.evaluation.results import CONFIG, SAMPLES, methods_by_label, write_text
from sdt_dist.evaluation.summary import recompute
from sdt_dist.evaluation.tables import COLUMNS, cell, number
from sdt_dist.search.methods import get_method

_CAPTIONS = {
    "quality_cost": "CRPS against cost; every method had the same nfe budget, `greedy` and `sample` are reference lines.",
    "rewards": "Rewards of all returned samples.",
    "spectra": "Mean power spectra. The mean forecast loses power at high frequencies: PSD(E x) <= E PSD(x).",
    "fans": "Forecasts of some problems, base above aligned.",
    "diversity": "Distinct samples against mean reward.",
    "tree": "The first problem's search tree: its most visited nodes, line width by visits.",
    "log_z": "Effective sample size and the stated standard error of log Z.",
}
_TERMINAL = ("crps", "mase", "coverage_80", "spec_w1", "log_l1", "reward_mean", "ess", "nfe", "wall_s")
_LEGEND = """\
Means over problems, every method with the same budget of model evaluations.
* reference line, outside that budget
CRPS, MASE      forecast error, lower is better
cov80           share of the truth inside the 80% interval, near .80 is better
specW1, logL1   distance of the power spectrum from the history's; near the
                true future's own value is better, not below it
reward          mean over samples, higher is better
ESS             how many independent samples the weights are worth
NFE, s          model evaluations and seconds per problem"""


def print_table(directory: Path) -> None:
    """The summary as a terminal table of 80 columns, with what each column means."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    truth = json.loads((directory / "truth.json").read_text(encoding="utf-8"))["summary"]
    methods = methods_by_label(directory)
    columns = [column for column in COLUMNS if column.metric in _TERMINAL]
    table = Table(box=SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("method")
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    for label in summary:
        mark = "*" if label in methods and get_method(methods[label]).reference else ""
        table.add_row(label + mark, *(cell(summary, label, column.metric) for column in columns))
    table.add_section()
    table.add_row("true future", *(number(truth[c.metric]["mean"]) if c.metric in truth else "" for c in columns))
    console = Console()
    console.print(table, highlight=False)
    console.print(_LEGEND, highlight=False, markup=False)
    for label, row in summary.items():
        if row["success_rate"]["mean"] < 1:
            console.print(f"{label}: {1 - row['success_rate']['mean']:.0%} of the searches failed.", highlight=False)


def write_report(directories: list[Path], output: Path) -> Path:
    """report.md with tables and figures of one or more runs; numbers are recomputed from their samples.

    ResultsError for a directory without a run, and when the disk refuses.
    """
    parts = ["# Evaluation report", "", f"sdt-dist {version('sdt-dist')}, Python {platform.python_version()}.", ""]
    for directory in directories:
        if not (directory / SAMPLES).is_file():
            raise ResultsError(f"results: {directory} holds no {SAMPLES}; give directories that `sdt evaluate` wrote.")
        methods_by_label(directory)
    for index, directory in enumerate(directories):
        recompute(directory)
        parts += [f"## {directory.name}", "", (directory / "summary.md").read_text(encoding="utf-8"), ""]
        for figure in draw_all(directory):
            name = f"run_{index}/{figure.name}"
            _copy(figure, output / name)
            parts += [f"![{figure.stem}]({name})", "", _CAPTIONS[figure.stem], ""]
        config = (directory / CONFIG).read_text(encoding="utf-8").strip()
        parts += ["Configuration:", "", "```yaml", config, "```", ""]
    write_text(output / "report.md", "\n".join(parts))
    return output / "report.md"


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    except OSError as error:
        raise ResultsError(f"output: {target} cannot be written ({error.strerror}); give another directory.") from error
