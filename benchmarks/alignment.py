"""ETTh1 alignment from result files: ratios to plain sampling, and the strong tilt against snis and smc.

    python -m benchmarks.alignment --run results/etth1_alignment --strong results/etth1_strong \\
        --reference results/etth1_reference

Reads what `sdt evaluate examples/etth1_*.yaml` wrote and prints Markdown. Intervals are 95% bootstrap over problems,
paired. The error of log Z is |log Z-hat - reference|, the reference's own error is printed; rewards are compared
on the same number of distinct samples a problem (the smallest that any method returned).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sdt_dist.evaluation.results import Line, read_lines
from sdt_dist.evaluation.summary import tabulate
from sdt_dist.metrics.aggregate import paired_difference, ratio_of_means, summarise

RATIOS = ("crps", "spec_w1", "spec_w1_half", "log_l1")
TARGETS = {"crps": 1.02, "spec_w1": 0.80, "log_l1": 1.0}
ESS_TARGET = 100.0


def _cell(found: dict[str, float], digits: int = 3) -> str:
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def ratios(directory: Path) -> str:
    """Markdown: ratio of means to `sample` by method, ESS, and whether each target is met."""
    table = tabulate(directory)
    lines = [
        "| method | " + " | ".join(f"{m} / sample" for m in RATIOS) + " | ESS | targets |",
        "|---|" + "---:|" * 6,
    ]
    for label, rows in table.items():
        index = [i for i in rows if all(m in rows[i] and m in table["sample"][i] for m in RATIOS)]
        columns = {
            m: [np.array([t[i][m] for i in index]) for t in (rows, table["sample"])] for m in RATIOS
        }
        found = {m: ratio_of_means(*pair) for m, pair in columns.items()}
        ess = (
            float(np.mean([rows[i]["ess"] for i in index]))
            if all("ess" in rows[i] for i in index)
            else None
        )
        met = (
            ess is not None
            and ess >= ESS_TARGET
            and all(found[m]["mean"] <= bound for m, bound in TARGETS.items())
        )
        verdict = "" if label == "sample" else "met" if met else "not met"
        cells = [*(_cell(found[m]) for m in RATIOS), "–" if ess is None else f"{ess:.0f}", verdict]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _lines(directory: Path) -> dict[str, dict[int, Line]]:
    found: dict[str, dict[int, Line]] = {}
    for line in read_lines(directory):
        found.setdefault(line["label"], {})[line["problem"]] = line
    return found


def _reward_of_distinct(line: Line, count: int) -> float:
    """Mean reward of the first `count` distinct samples; samples come in random order."""
    rewards = {
        tuple(tokens): reward
        for tokens, reward in zip(line["tokens"], line["rewards"], strict=True)
    }
    return float(np.mean(list(rewards.values())[:count]))


def strong(directory: Path, reference: Path) -> str:
    """Markdown: means by method and paired differences to snis and smc at a strong tilt."""
    runs = _lines(directory)
    table = tabulate(directory)
    truth = next(iter(_lines(reference).values()))
    problems = sorted(truth)
    fewest = {
        i: min(
            len({tuple(t) for t in runs[label][i]["tokens"]}) for label in runs if label != "sample"
        )
        for i in problems
    }
    measures: dict[str, dict[str, np.ndarray]] = {}
    for label, rows in runs.items():
        measures[label] = {
            "reward": np.array([_reward_of_distinct(rows[i], fewest[i]) for i in problems]),
            "CRPS": np.array([table[label][i]["crps"] for i in problems]),
        }
        if all(rows[i]["log_z"] is not None for i in problems):
            errors = [abs(rows[i]["log_z"] - truth[i]["log_z"]) for i in problems]
            measures[label]["log Z error"] = np.array(errors)
    names = ("log Z error", "reward", "CRPS")
    own = np.mean([truth[i]["log_z_error"] for i in problems])
    ess = np.mean([runs["snis"][i]["ess"] for i in problems])
    parts = [
        f"{len(problems)} problems, ESS of snis {ess:.0f}, the reference's own standard error of log Z {own:.3f}, "
        f"{np.mean(list(fewest.values())):.1f} distinct samples compared a problem on average.",
        "",
        "| method | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for label, columns in measures.items():
        cells = [_cell(summarise(columns[n])) if n in columns else "–" for n in names]
        parts.append(f"| {label} | " + " | ".join(cells) + " |")
    for base in ("snis", "smc"):
        parts += [
            "",
            f"Paired differences to {base}:",
            "",
            "| method | " + " | ".join(names) + " |",
        ]
        parts.append("|---|" + "---:|" * len(names))
        for label, columns in measures.items():
            if label in ("sample", base):
                continue
            cells = [
                _cell(paired_difference(columns[n], measures[base][n])) if n in columns else "–"
                for n in names
            ]
            parts.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="results of examples/etth1_alignment.yaml")
    parser.add_argument("--strong", type=Path, help="results of examples/etth1_strong.yaml")
    parser.add_argument("--reference", type=Path, help="results of examples/etth1_reference.yaml")
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(ratios(arguments.run))
    if arguments.strong is not None:
        print("\n" + strong(arguments.strong, arguments.reference))


if __name__ == "__main__":
    main()
