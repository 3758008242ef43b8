"""summary.json, truth.json and summary.md, computed from problems.json and samples.jsonl only (SPEC section 8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.evaluation.results import Line, ResultLog, read_problems, write_text
from sdt_dist.metrics.aggregate import paired_difference, ratio_of_sums, summarise
from sdt_dist.metrics.forecast import forecast_measures, spectral_measures
from sdt_dist.metrics.text import distinct_n, perplexity

Row = dict[str, float]
Summary = dict[str, dict[str, dict[str, float]]]
TABLE = [
    ("crps", "CRPS", "lower"),
    ("wql", "WQL", "lower"),
    ("mase", "MASE", "lower"),
    ("coverage_80", "80% coverage", "near .80"),
    ("spec_w1", "Spec-W1 (L)", "near the truth's"),
    ("spec_w1_half", "Spec-W1 (L/2)", "near the truth's"),
    ("log_l1", "log-L1", "near the truth's"),
    ("reward_mean", "reward", "higher"),
    ("reward_best", "best reward", "higher"),
    ("ess", "ESS", "higher"),
    ("log_z", "log Z", "-"),
    ("distinct_samples", "distinct", "higher"),
    ("nfe", "NFE", "matched"),
    ("wall_s", "s/problem", "lower"),
]


def measures_of(line: Line, problem: ForecastProblem) -> Row:
    """All measures of one result line; a failed line has success_rate 0 and nothing else."""
    if line["status"] != "ok" or not line["samples"]:
        return {"success_rate": 0.0}
    samples = np.array(line["samples"], dtype=np.float64)
    row = forecast_measures(samples, problem.truth, problem.history, problem.season, problem.loc, problem.scale)
    mean = (samples.mean(axis=0, keepdims=True) - problem.loc) / problem.scale
    lengths = [len(tokens) for tokens in line["tokens"]]
    row |= {
        "log_l1_of_mean": spectral_measures(mean, (problem.history - problem.loc) / problem.scale)["log_l1"],
        "reward_mean": float(np.mean(line["rewards"])),
        "reward_best": line["best_reward"],
        "distinct_samples": float(len({tuple(tokens) for tokens in line["tokens"]})),
        "perplexity": perplexity(line["log_probs"], lengths),
        "success_rate": 1.0,
        "length": float(np.mean(lengths)),
        "length_ratio": float(np.mean(lengths) / len(problem.truth)),
        **{f"distinct_{n}": distinct_n(line["tokens"], n) for n in (1, 2, 3)},
        **{name: float(line[name]) for name in ("nfe", "model_calls", "rollouts", "reward_calls", "wall_s")},
    }
    row |= {name: float(line[name]) for name in ("log_z", "log_z_error", "ess") if line[name] is not None}
    stats = line["tree_stats"]
    names = {"nodes": "nodes", "depth_max": "depth", "branching_mean": "branching"}
    return row | {target: stats[source] for source, target in names.items() if source in stats}


def tabulate(directory: Path) -> dict[str, dict[int, Row]]:
    """Measures by label and problem, recomputed from the result files."""
    problems = {problem.index: problem for problem in read_problems(directory)}
    table: dict[str, dict[int, Row]] = {}
    for line in ResultLog(directory).lines:
        table.setdefault(line["label"], {})[line["problem"]] = measures_of(line, problems[line["problem"]])
    return table


def summarise_table(table: dict[str, dict[int, Row]]) -> Summary:
    """{label: {metric: {mean, low, high}}}; each metric over the problems that have it, WQL as a ratio of sums."""
    summary: Summary = {}
    for label, rows in table.items():
        names = sorted({name for row in rows.values() for name in row} - {"wql_loss", "wql_scale"})
        summary[label] = {n: summarise(np.array([row[n] for row in rows.values() if n in row])) for n in names}
        scored = [row for row in rows.values() if "wql_loss" in row]
        if scored:
            losses, scales = (np.array([row[key] for row in scored]) for key in ("wql_loss", "wql_scale"))
            summary[label]["wql"] = ratio_of_sums(losses, scales)
    return summary


def truth_measures(problems: list[ForecastProblem]) -> dict[str, Any]:
    """The true futures' own spectral measures against their histories: where a method should come near."""
    rows = [spectral_measures(((p.truth - p.loc) / p.scale)[None], (p.history - p.loc) / p.scale) for p in problems]
    means = {name: summarise(np.array([row[name] for row in rows])) for name in rows[0]}
    return {"summary": means, "problems": {p.name: row for p, row in zip(problems, rows, strict=True)}}


def recompute(directory: Path) -> Summary:
    """Write summary.json, truth.json and summary.md from the result files; returns the summary."""
    table = tabulate(directory)
    summary, truth = summarise_table(table), truth_measures(read_problems(directory))
    write_text(directory / "summary.json", json.dumps(summary, indent=1))
    write_text(directory / "truth.json", json.dumps(truth, indent=1))
    write_text(directory / "summary.md", to_markdown(summary, truth, table))
    return summary


def cell(summary: Summary, label: str, metric: str) -> str:
    """A mean as people read it, or a dash."""
    found = summary[label].get(metric)
    return "–" if found is None else _number(found["mean"])


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.01 else f"{value:.3f}"


def to_markdown(summary: Summary, truth: dict[str, Any], table: dict[str, dict[int, Row]]) -> str:
    """The table of means, the truth's own spectra below it, and paired differences to `sample`."""
    shown = [column for column in TABLE if any(column[0] in row for row in summary.values())]
    lines = [
        "| method | " + " | ".join(f"{title} ({better})" for _, title, better in shown) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    for label in summary:
        lines.append(f"| {label} | " + " | ".join(cell(summary, label, metric) for metric, _, _ in shown) + " |")
    known = truth["summary"]
    own = [_number(known[metric]["mean"]) if metric in known else "" for metric, _, _ in shown]
    lines.append("| *true future* | " + " | ".join(own) + " |")
    problems = len(next(iter(table.values()), {}))
    lines += ["", f"Means over {problems} problems; 95% bootstrap intervals are in summary.json."]
    return "\n".join(lines + _paired(table)) + "\n"


def _paired(table: dict[str, dict[int, Row]]) -> list[str]:
    """Differences to plain sampling on the same problems, with 95% intervals."""
    base = table.get("sample")
    if base is None or len(table) < 2:
        return []
    metrics = ("crps", "spec_w1", "log_l1", "reward_mean")
    lines = [
        "",
        "Paired differences to `sample` (mean [95% interval]):",
        "",
        "| method | " + " | ".join(metrics) + " |",
    ]
    lines.append("|---|" + "---:|" * len(metrics))
    for label, rows in table.items():
        if label == "sample":
            continue
        cells = []
        for metric in metrics:
            both = [i for i in rows if metric in rows[i] and metric in base.get(i, {})]
            if not both:
                cells.append("–")
                continue
            found = paired_difference(*(np.array([t[i][metric] for i in both]) for t in (rows, base)))
            cells.append(f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines
