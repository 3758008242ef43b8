"""Reports of runs: a table in the terminal, and HTML, Markdown and figures for one or more runs.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.results import SAMPLES, methods_by_label, saved_config
from sdt_dist.evaluation.tables import cell, columns_of, number
from sdt_dist.files import write_text
from sdt_dist.report.blocks import Section, Text
from sdt_dist.report.changes import sections_of_several
from sdt_dist.report.figures.draw import draw_all
from sdt_dist.report.figures.files import draw
from sdt_dist.report.figures.problem import problem_fans
from sdt_dist.report.figures.tree import draw_value_error, first_tree
from sdt_dist.report.html import to_html
from sdt_dist.report.markdown import to_markdown
from sdt_dist.report.run import RunFiles, run_section
from sdt_dist.report.tree import PROBLEM_FANS, PROBLEM_TREE, Choice, check_choice, problem_section
from sdt_dist.report.value_error import VALUE_ERROR, ValueErrors, value_error_section
from sdt_dist.search.methods import get_method

SUFFIXES = (".png", ".pdf", ".svg")  # of every figure: for Markdown, for papers, for the page
_TERMINAL = (
    "crps",
    "mase",
    "coverage_80",
    "spec_w1",
    "log_l1",
    "reward_mean",
    "ess",
    "nfe",
    "wall_s",
)
_LEGEND = """\
Means over problems, every method with the same budget of model evaluations
unless its label names another.
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
    task = saved_config(directory).task
    columns = [column for column in columns_of(task) if column.metric in _TERMINAL]
    table = Table(box=SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("method")
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    for label in summary:
        mark = "*" if label in methods and get_method(methods[label]).reference else ""
        table.add_row(
            escape(label + mark), *(cell(summary, label, column.metric) for column in columns)
        )
    table.add_section()
    table.add_row(
        task.truth_name,
        *(number(truth[c.metric]["mean"]) if c.metric in truth else "" for c in columns),
    )
    console = Console()
    console.print(table, highlight=False)
    console.print(_LEGEND, highlight=False, markup=False)
    for label, row in summary.items():
        if row["success_rate"]["mean"] < 1:
            console.print(
                f"{label}: {1 - row['success_rate']['mean']:.0%} of the searches failed.",
                highlight=False,
            )


def write_report(
    directories: list[Path],
    output: Path,
    *,
    reference: str | None = None,
    problem: int | None = None,
    method: str | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Path:
    """report.html, which needs nothing else, and report.md beside figures/, of one or more runs; returns the former.

    Numbers are recomputed from the runs' samples. reference: the label that others are compared with, default plain
    sampling; problem and method: whose forecasts and search tree are shown. say: told what is being done. A directory may
    also hold value_error.json alone. ResultsError for a directory with neither, damaged files, an unknown label or problem,
    and a full disk.
    """
    for directory in directories:
        if not (directory / SAMPLES).is_file() and not (directory / VALUE_ERROR).is_file():
            raise ResultsError(
                f"results: {directory} holds no {SAMPLES} (nor {VALUE_ERROR}); give directories that `sdt evaluate` wrote."
            )
    named = list(zip(directories, _names(directories), strict=True))
    runs = []
    for place, (directory, name) in enumerate(named):
        if (directory / SAMPLES).is_file():
            say(f"{name}: measures of every sample")
            runs.append(RunFiles.load(directory, name, f"run-{place}"))
    toys = [
        (name, errors)
        for directory, name in named
        if (errors := ValueErrors.load(directory)) is not None
    ]
    check_choice(runs, problem, method, reference)
    choices = [Choice.of(files, problem, method) for files in runs]
    say("comparing the runs")
    sections = sections_of_several(runs)
    for files, choice in zip(runs, choices, strict=True):
        say(f"{files.name}: figures and tests")
        sections.append(_section_of_run(files, output, choice, files.reference(reference)))
    sections += [
        _section_of_toys(f"toys-{place}", *found, output) for place, found in enumerate(toys)
    ]
    *earlier, last = (name for _, name in named)
    title = f"Evaluation of {', '.join(earlier)}{' and ' if earlier else ''}{last}"
    subtitle = f"Made by sdt-dist {version('sdt-dist')} from the runs' result files alone."
    write_text(
        output / "report.md",
        to_markdown(title, [Section("", "", [Text(subtitle)]), *sections], output),
    )
    write_text(output / "report.html", to_html(title, subtitle, sections))
    return output / "report.html"


def _names(directories: list[Path]) -> list[str]:
    """Names of the runs in a report: those of their directories, with a number where two have the same."""
    plain = [directory.resolve().name for directory in directories]
    return [
        name if plain.count(name) == 1 else f"{name} ({plain[:place].count(name) + 1})"
        for place, name in enumerate(plain)
    ]


def _section_of_run(files: RunFiles, output: Path, choice: Choice, reference: str) -> Section:
    """Draw a run's figures and say everything of it."""
    folder = output / "figures" / files.key
    painters: dict[str, Callable[[], Figure | None]] = {}
    if choice.problem in files.run.problems:
        painters[PROBLEM_FANS] = partial(problem_fans, files.run, choice.problem)
    if choice.label is not None and choice.method is not None:
        painters[PROBLEM_TREE] = partial(first_tree, files.run, choice.label)
    drawn = draw_all(files.directory, folder, SUFFIXES) + draw(painters, folder, SUFFIXES)
    stems = [path.with_suffix("") for path in drawn]
    return run_section(files, stems, problem_section(files, choice, stems), reference)


def _section_of_toys(key: str, name: str, errors: ValueErrors, output: Path) -> Section:
    """Draw the curves of a value_error.json and show them."""
    painters = {"value_error": partial(draw_value_error, errors.curves)}
    (path,) = draw(painters, output / "figures" / key, SUFFIXES)
    return value_error_section(errors, key, name, path.with_suffix(""))
