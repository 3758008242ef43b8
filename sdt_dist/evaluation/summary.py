"""summary.json, truth.json and summary.md, computed from problems.json and samples.jsonl only.

See docs/guides/evaluate.md.

Metrics are imported where they are computed: their libraries load torch, which planning a run must not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.results import SAMPLES, Line, read_lines, read_problems
from sdt_dist.evaluation.tables import Row, Summary, Table, to_markdown
from sdt_dist.files import write_text

_COSTS = ("nfe", "model_calls", "rollouts", "reward_calls", "recomputed_tokens", "wall_s")


def measures_of(line: Line, problem: ForecastProblem) -> Row:
    """All measures of one result line; a failed line has success_rate 0 and nothing else."""
    if line["status"] != "ok" or not line["samples"]:
        return {"success_rate": 0.0}
    from sdt_dist.metrics.forecast import forecast_measures, spectral_measures
    from sdt_dist.metrics.text import distinct_n, perplexity

    samples = np.array(line["samples"], dtype=np.float64)
    row = forecast_measures(
        samples, problem.truth, problem.history, problem.season, problem.loc, problem.scale
    )
    mean = (samples.mean(axis=0, keepdims=True) - problem.loc) / problem.scale
    lengths = [len(tokens) for tokens in line["tokens"]]
    of_mean = spectral_measures(mean, (problem.history - problem.loc) / problem.scale)
    row |= {f"{name}_of_mean": value for name, value in of_mean.items() if name == "log_l1"}
    row |= {
        "reward_mean": float(np.mean(line["rewards"])),
        "reward_best": line["best_reward"],
        "distinct_samples": float(len({tuple(tokens) for tokens in line["tokens"]})),
        "perplexity": perplexity(line["log_probs"], lengths),
        "success_rate": 1.0,
        "length": float(np.mean(lengths)),
        "length_ratio": float(np.mean(lengths) / len(problem.truth)),
        **{f"distinct_{n}": distinct_n(line["tokens"], n) for n in (1, 2, 3)},
        **{name: float(line[name]) for name in _COSTS},
    }
    row |= {
        name: float(line[name])
        for name in ("log_z", "log_z_error", "ess")
        if line[name] is not None
    }
    stats = line["tree_stats"]
    names = {"nodes": "nodes", "depth_max": "depth", "branching_mean": "branching"}
    return row | {target: stats[source] for source, target in names.items() if source in stats}


def tabulate(directory: Path) -> Table:
    """Measures by label and problem, recomputed from the result files."""
    problems = {problem.index: problem for problem in read_problems(directory)}
    table: Table = {}
    for line in read_lines(directory):
        if line["problem"] not in problems:
            raise ResultsError(
                f"results: {directory} has a result of problem {line['problem']}, which it does not hold."
            )
        table.setdefault(line["label"], {})[line["problem"]] = _checked_measures(
            line, problems[line["problem"]], directory
        )
    return table


def _checked_measures(line: Line, problem: ForecastProblem, directory: Path) -> Row:
    try:
        return measures_of(line, problem)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(
            f"results: the line of problem {line['problem']} and {line['label']} in {directory / SAMPLES} is damaged "
            f"({type(error).__name__}: {error}); take the line out and go on with `sdt evaluate --resume`."
        ) from error


def summarise_table(table: Table) -> Summary:
    """{label: {metric: {mean, low, high}}}; each metric over the problems that have it, WQL as a ratio of sums."""
    from sdt_dist.metrics.aggregate import ratio_of_sums, summarise

    summary: Summary = {}
    for label, rows in table.items():
        names = sorted({name for row in rows.values() for name in row} - {"wql_loss", "wql_scale"})
        summary[label] = {
            n: summarise(np.array([row[n] for row in rows.values() if n in row])) for n in names
        }
        scored = [row for row in rows.values() if "wql_loss" in row]
        if scored:
            losses, scales = (
                np.array([row[key] for row in scored]) for key in ("wql_loss", "wql_scale")
            )
            summary[label]["wql"] = ratio_of_sums(losses, scales)
    return summary


def truth_measures(problems: list[ForecastProblem]) -> dict[str, Any]:
    """The true futures' own spectral measures against their histories: where a method should come near."""
    from sdt_dist.metrics.aggregate import summarise
    from sdt_dist.metrics.forecast import spectral_measures

    rows = [
        spectral_measures(((p.truth - p.loc) / p.scale)[None], (p.history - p.loc) / p.scale)
        for p in problems
    ]
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
    summary = summarise_table(table)
    truth = truth_measures(read_problems(directory))
    write_text(directory / "summary.json", json.dumps(summary, indent=1))
    write_text(directory / "truth.json", json.dumps(truth, indent=1))
    write_text(directory / "summary.md", to_markdown(summary, truth, table))
    return summary
