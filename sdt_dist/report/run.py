"""One run's part of a report: what was asked, results with paired tests, figures, one problem, costs, how it was made.

Everything is recomputed from the run's files. It must not know how a report is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.environment import backends_of, environment_facts, read_environment
from sdt_dist.evaluation.labels import family, middle
from sdt_dist.evaluation.method_options import options_of
from sdt_dist.evaluation.results import CONFIG, read_lines, saved_config
from sdt_dist.evaluation.significance import between_methods
from sdt_dist.evaluation.summary import tabulate, write_summary
from sdt_dist.evaluation.tables import BASE, COLUMNS, Column, Summary, Table
from sdt_dist.report.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Grid,
    Picture,
    Row,
    Section,
    Text,
    by_rows,
    interval_cells,
    number_cells,
    text_cells,
)
from sdt_dist.report.differences import differences_grid, explain, hint, in_words
from sdt_dist.report.figures.run import Run
from sdt_dist.search.methods import get_method

TRUE_FUTURE = "true future"
COSTS = [
    Column("nfe", "NFE", "", "matched"),
    Column("model_calls", "model calls", "", "fewer"),
    Column("rollouts", "rollouts", "", ""),
    Column("reward_calls", "reward calls", "", ""),
    Column("recomputed_tokens", "recomputed tokens", "", "fewer"),
    Column("wall_s", "seconds", "", "lower"),
]
COST_RATIOS = [
    Column("ms_per_nfe", "ms per NFE", "", "lower"),
    Column("problems", "problems", "", ""),
    Column("failed", "failed", "", "none"),
]
FORECAST = ("crps", "wql", "mase", "coverage_80", "spec_w1", "spec_w1_half", "log_l1")
SEARCH = ("reward_mean", "reward_best", "ess", "log_z", "distinct_samples")
_ABLATIONS = "Ablations"
_FIGURES: dict[str, tuple[str, str]] = {
    "quality_cost": (
        "Quality and cost",
        "CRPS at the matched budget and against seconds: means over problems with 95% bootstrap intervals. `greedy` and `sample` "
        "are reference lines outside the budget.",
    ),
    "ablation": (
        _ABLATIONS,
        "Means over problems at every combination of the settings that were varied.",
    ),
    "fans": ("Forecasts", "Forecasts of some problems, plain samples above aligned ones."),
    "spectra": (
        "Spectra",
        "Power spectra of history, true future and samples. The mean forecast loses power at every frequency: PSD(E x) ≤ E PSD(x). A "
        "good method comes near the true future's spectrum.",
    ),
    "rewards": ("Rewards and diversity", "Rewards of all returned samples."),
    "diversity": (
        "Rewards and diversity",
        "Distinct samples against their mean reward, with 95% intervals.",
    ),
    "log_z": (
        "Effective samples and log Z",
        "Effective sample size, and the standard error of log Z that a search states.",
    ),
}


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run as a report needs it: its name in the report, its files, and measures recomputed from them."""

    name: str
    key: str
    run: Run
    config: EvaluationConfig
    table: Table
    summary: Summary
    environment: list[dict[str, Any]]

    @classmethod
    def load(cls, directory: Path, name: str, key: str) -> RunFiles:
        """Read a run and write its summary files anew. ResultsError for what is missing or damaged."""
        config = saved_config(directory)
        table = tabulate(directory)
        if not table:
            raise ResultsError(
                f"results: {directory} holds no result yet; go on with `sdt evaluate --resume`."
            )
        summary = write_summary(directory, table)
        return cls(name, key, Run(directory), config, table, summary, read_environment(directory))

    @property
    def directory(self) -> Path:
        return self.run.directory

    def reference(self, wanted: str | None) -> str:
        """What others are compared with: the wanted label, plain sampling, or the first method, at the middle of an ablation."""
        return next(
            label
            for label in (wanted, BASE, *middle(self.config), *self.table)
            if label in self.table
        )


def run_section(
    files: RunFiles, figures: Sequence[Path], one_problem: Section, reference: str
) -> Section:
    """The whole part of one run; `figures` are the stems of the files that were drawn. An ablation's own come first."""
    drawn = figure_sections(files.key, figures)
    first = [section for section in drawn if section.title == _ABLATIONS]
    return Section(
        files.name,
        files.key,
        [Text(_asked(files)), _request(files)],
        [
            *first,
            Section("Results", f"{files.key}-results", _results(files)),
            Section(f"Compared with {reference}", f"{files.key}-paired", _paired(files, reference)),
            *(section for section in drawn if section not in first),
            one_problem,
            Section(
                "Costs",
                f"{files.key}-costs",
                [costs(files), Text(_COSTS_EXPLAINED), *_failures(files.directory)],
            ),
            Section("How it was made", f"{files.key}-made", _made(files)),
        ],
    )


def _asked(files: RunFiles) -> str:
    config = files.config
    num = len({family(method) for method in config.method_configs()})
    methods = f"{num} method{'' if num == 1 else 's'}"
    if config.ablate:
        methods += f" at {len(files.table)} points of an ablation"
    text = (
        f"Samples from p(x|c)·exp(λ·r(x)) with λ = {_setting(config, 'lambda')} and r = `{config.reward}`: "
        f"{methods} on the same {len(files.run.problems)} problems of `{config.dataset}`, each "
        f"with the cost of about {_setting(config, 'rollouts')} rollouts (methods marked * are reference lines outside that budget)."
    )
    missing = len(config.methods) * len(files.run.problems) - sum(map(len, files.table.values()))
    return f"{text} The run is not finished: {missing} searches are missing." if missing else text


def _request(files: RunFiles) -> Grid:
    config = files.config
    facts = {
        "data": f"{config.dataset}, {config.split} part"
        + (f", {', '.join(config.channels)}" if config.channels else ""),
        "problems": str(len(files.run.problems)),
        "horizon and context": f"{config.horizon} values after {config.context_length}",
        "model": config.model,
        "reward": config.reward,
        "λ": _setting(config, "lambda"),
        "budget": f"cost of {_setting(config, 'rollouts')} rollouts a problem",
        **{
            f"{name}, varied": _setting(config, name)
            for name in config.ablate
            if name not in ("lambda", "rollouts")
        },
        "samples returned": str(config.num_samples),
        "seed": str(config.seed),
        "answered by": backends_of(files.environment),
    }
    return Grid(
        "request", "asked", ["value"], [Row(name, [Cell(value)]) for name, value in facts.items()]
    )


def _setting(config: EvaluationConfig, name: str) -> str:
    """λ, the budget or another parameter as the run had it, or all the values that its methods or its ablation gave it."""
    if name == "lambda":
        searched = [
            method for method in config.method_configs() if not get_method(method.name).reference
        ]
        own = {options_of(config, method)["inverse_temperature"] for method in searched}
        values = sorted(own) or [config.inverse_temperature]
    else:
        values = config.ablate.get(name, [config.num_rollouts])
    *most, last = [f"{value:g}" for value in values]
    return f"{', '.join(most)} and {last}" if most else last


def _results(files: RunFiles) -> list[Block]:
    """Means with intervals of every method, and the true futures' own spectra."""
    truth: dict[str, dict[str, float]] = files.run.truth["summary"]
    grids = [means_grid(files, FORECAST, truth), means_grid(files, SEARCH, {})]
    if not any(grid.titles for grid in grids):
        return [Text("Every search failed; see the costs below.")]
    return [
        *(grid for grid in grids if grid.titles),
        Text(
            f"Means over {len(files.run.problems)} problems, with 95% bootstrap intervals over problems below them. CRPS and the "
            "spectral distances are of z-scored series. Spec-W1 and log-L1 are distances from the history's spectrum: a good "
            "method comes near the true future's own value, not below it."
        ),
    ]


def means_grid(files: RunFiles, metrics: Sequence[str], truth: dict[str, dict[str, float]]) -> Grid:
    """Means and intervals of those metrics that the run has, one row a method; the true futures' where they have any."""
    columns = [
        c
        for c in COLUMNS
        if c.metric in metrics and any(c.metric in row for row in files.summary.values())
    ]
    rows = dict(files.summary) | ({TRUE_FUTURE: truth} if truth else {})
    cells = [
        interval_cells(column.metric, [row.get(column.metric) for row in rows.values()])
        for column in columns
    ]
    return label_grid("methods", columns, cells, files, list(rows))


def label_grid(
    name: str,
    columns: Sequence[Column],
    cells: Sequence[Sequence[Cell]],
    files: RunFiles,
    labels: Sequence[str],
) -> Grid:
    """A table of a run with one row a label; a star marks reference lines."""
    names = {method.label: method.name for method in files.config.method_configs()}
    marks = [
        "*" if label in names and get_method(names[label]).reference else "" for label in labels
    ]
    rows = [
        Row(label + mark, row, files.key, label)
        for label, mark, row in zip(
            labels, marks, by_rows(cells) or [[] for _ in labels], strict=True
        )
    ]
    return Grid(name, "method", [c.title for c in columns], rows, [hint(c) for c in columns])


def _paired(files: RunFiles, reference: str) -> list[Block]:
    if len(files.table) < 2:
        return [Text("The run has one method, so there is nothing to compare.")]
    table = files.table
    if files.run.reward_note:  # by each label's own reward, so not comparable
        table = {
            label: {
                i: {m: value for m, value in row.items() if m != "reward_mean"}
                for i, row in rows.items()
            }
            for label, rows in table.items()
        }
    found = between_methods(table, reference)
    if not any(found.values()):
        return [Text("No problem was solved by two methods, so there is nothing to compare.")]
    return [
        Bullets(in_words(found, f" than `{reference}`")),
        differences_grid(found, "paired", files.key),
        Text(explain(found, f"a method minus `{reference}` on the same problem")),
    ]


def figure_sections(key: str, figures: Sequence[Path]) -> list[Section]:
    """Pictures under the headings of the figures' kinds, in the order of the report."""
    by_name = {stem.name: stem for stem in figures}
    parts: dict[str, list[Block]] = {}
    for name, (title, caption) in _FIGURES.items():
        if name in by_name:
            parts.setdefault(title, []).append(Picture(by_name[name], caption))
    return [
        Section(title, f"{key}-{title.lower().replace(' ', '-')}", blocks)
        for title, blocks in parts.items()
    ]


def costs(files: RunFiles) -> Grid:
    """What every method paid a problem, its time per NFE, the problems that it was given, and its failures."""
    table = files.table
    labels = list(files.table)
    columns = [
        number_cells(c.metric, [cost_mean(table, label, c.metric) for label in labels])
        for c in COSTS
    ]
    columns.append(number_cells("ms_per_nfe", [ms_per_nfe(table, label) for label in labels]))
    columns.append(number_cells("problems", [float(len(table[label])) for label in labels]))
    failed = [
        float(sum(row["success_rate"] == 0 for row in table[label].values())) for label in labels
    ]
    columns.append(number_cells("failed", failed))
    return label_grid("costs", [*COSTS, *COST_RATIOS], columns, files, labels)


def cost_mean(table: Table, label: str, metric: str) -> float | None:
    """Mean of a cost over the problems that were solved; None where none was."""
    found = [row[metric] for row in table[label].values() if metric in row]
    return float(np.mean(found)) if found else None


def ms_per_nfe(table: Table, label: str) -> float | None:
    """Milliseconds per next-token distribution, over all problems of a method."""
    nfe, wall = (
        sum(row.get(metric, 0.0) for row in table[label].values()) for metric in ("nfe", "wall_s")
    )
    return 1000 * wall / nfe if nfe else None


_COSTS_EXPLAINED = (
    "Means a problem. NFE: next-token distributions that were computed. A model call is a batch in which a search took part. "
    "Seconds are a search's share of the time in which many run together, so they compare methods, not machines under other load; "
    "who searched first paid for warming up."
)


def _failures(directory: Path) -> list[Block]:
    """One sentence a method with failed searches, with the first error."""
    failed: dict[str, list[str]] = {}
    for line in read_lines(directory):
        if line["status"] != "ok":
            failed.setdefault(line["label"], []).append(
                f"{line['name']}: {' '.join(str(line.get('error')).split())}"
            )
    items = [
        f"`{label}` failed on {len(errors)} problems, first on {errors[0]}"
        for label, errors in failed.items()
    ]
    return [Bullets(items)] if items else []


def _made(files: RunFiles) -> list[Block]:
    """Configuration, versions and hardware."""
    blocks: list[Block] = [Code((files.directory / CONFIG).read_text(encoding="utf-8").strip())]
    if not files.environment:
        return [
            *blocks,
            Text("The run did not note its versions and hardware (it holds no environment.json)."),
        ]
    return [*blocks, *(environment_grid(entry) for entry in files.environment)]


def environment_grid(entry: dict[str, Any]) -> Grid:
    """One environment as a table of two columns."""
    packages = ", ".join(f"{name} {found}" for name, found in entry["packages"].items())
    facts = {
        name: fact
        for name, fact in environment_facts(entry).items()
        if name not in entry["packages"]
    }
    rows = [
        Row(name, text_cells([fact])) for name, fact in (facts | {"packages": packages}).items()
    ]
    return Grid("environment", "made with", ["value"], rows)
