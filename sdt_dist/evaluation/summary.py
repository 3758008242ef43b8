"""summary.json, truth.json and summary.md, computed from problems.json and samples.jsonl only.

See docs/guides/evaluate.md.

Metrics are imported where they are computed: their libraries load torch, which planning a run must not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.results import SAMPLES, Line, read_lines, read_problems, saved_config
from sdt_dist.evaluation.tables import Summary, Table, to_markdown
from sdt_dist.files import write_text
from sdt_dist.tasks.task import ProblemT, Row, Task

_COSTS = ("nfe", "model_calls", "rollouts", "reward_calls", "recomputed_tokens", "wall_s")


def measures_of(task: Task[ProblemT], line: Line, problem: ProblemT) -> Row:
    """All measures of one result line, the task's and every search's; a failed line has success_rate 0 and nothing else."""
    if line["status"] != "ok" or not line["samples"]:
        return {"success_rate": 0.0}
    return task.measures(line["samples"], problem) | _of_search(line, task.length_of(problem))


def _of_search(line: Line, true_length: int) -> Row:
    """What every search has: rewards, variety and length of its samples, costs, estimates, the shape of its tree."""
    from sdt_dist.metrics.text import distinct_n, perplexity

    lengths = [len(tokens) for tokens in line["tokens"]]
    row = {
        "reward_mean": float(np.mean(line["rewards"])),
        "reward_best": line["best_reward"],
        "distinct_samples": float(len({tuple(tokens) for tokens in line["tokens"]})),
        "perplexity": perplexity(line["log_probs"], lengths),
        "success_rate": 1.0,
        "length": float(np.mean(lengths)),
        "length_ratio": float(np.mean(lengths) / true_length),
        **{f"distinct_{n}": distinct_n(line["tokens"], n) for n in (1, 2, 3)},
        **{name: float(line[name]) for name in _COSTS},
    }
    estimates = {name: line[name] for name in ("log_z", "log_z_error", "ess")}
    row |= {name: float(value) for name, value in estimates.items() if value is not None}
    stats = line["tree_stats"]
    names = {"nodes": "nodes", "depth_max": "depth", "branching_mean": "branching"}
    return row | {target: stats[source] for source, target in names.items() if source in stats}


def tabulate(directory: Path) -> Table:
    """Measures by label and problem, recomputed from the result files."""
    task = saved_config(directory).task
    problems = {problem.index: problem for problem in read_problems(directory)}
    table: Table = {}
    for line in read_lines(directory):
        if line["problem"] not in problems:
            raise ResultsError(
                f"results: {directory} has a result of problem {line['problem']}, which it does not hold."
            )
        row = _checked_measures(task, line, problems[line["problem"]], directory)
        table.setdefault(line["label"], {})[line["problem"]] = row
    return table


def _checked_measures(task: Task[ProblemT], line: Line, problem: ProblemT, directory: Path) -> Row:
    try:
        return measures_of(task, line, problem)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(
            f"results: the line of problem {line['problem']} and {line['label']} in {directory / SAMPLES} is damaged "
            f"({type(error).__name__}: {error}); take the line out and go on with `sdt evaluate --resume`."
        ) from error


def summarise_table(task: Task[Any], table: Table) -> Summary:
    """{label: {metric: {mean, low, high}}}; each metric over the problems that have it, the task's ratios as ratios of sums."""
    from sdt_dist.metrics.aggregate import ratio_of_sums, summarise

    summary: Summary = {}
    summands = {name for pair in task.ratios.values() for name in pair}
    for label, rows in table.items():
        names = sorted({name for row in rows.values() for name in row} - summands)
        summary[label] = {
            n: summarise(np.array([row[n] for row in rows.values() if n in row])) for n in names
        }
        for name, pair in task.ratios.items():
            scored = [row for row in rows.values() if pair[0] in row]
            if scored:
                above, below = (np.array([row[key] for row in scored]) for key in pair)
                summary[label][name] = ratio_of_sums(above, below)
    return summary


def truth_measures(task: Task[ProblemT], problems: Sequence[ProblemT]) -> dict[str, Any]:
    """The truth's own measures, where a method should come near: their means, and by problem."""
    from sdt_dist.metrics.aggregate import summarise

    rows = [task.truth(problem) for problem in problems]
    means = {name: summarise(np.array([row[name] for row in rows])) for name in rows[0]}
    return {
        "summary": means,
        "problems": {p.name: row for p, row in zip(problems, rows, strict=True)},
    }


def recompute(directory: Path) -> Summary:
    """Write summary.json, truth.json and summary.md from the result files; returns the summary."""
    return write_summary(directory, tabulate(directory))


def write_summary(directory: Path, table: Table) -> Summary:
    """Write the three documents of a run whose measures are at hand; returns the summary."""
    task = saved_config(directory).task
    summary = summarise_table(task, table)
    truth = truth_measures(task, read_problems(directory))
    write_text(directory / "summary.json", json.dumps(summary, indent=1))
    write_text(directory / "truth.json", json.dumps(truth, indent=1))
    write_text(directory / "summary.md", to_markdown(task, summary, truth, table))
    return summary
