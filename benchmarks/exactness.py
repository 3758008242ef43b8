"""How near a finished search's own distribution is to pi*, on toys whose pi* is known.

See docs/concepts/exactness.md#toys.

    python -m benchmarks.exactness [--seeds 8] [--output results/toys]

Prints Markdown: total variation between `distribution()` and pi*, mean over search seeds 100, 101, ...; and the mean of
Z-hat / Z over 10,000 searches of 8 rollouts of a toy with 27 sequences, sequentially and in waves of 4.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.report.figures.tree import value_error_by_depth
from sdt_dist.report.value_error import ValueErrors
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem

TOYS = {
    "A": (5, 4, 1.0, "smooth", 5.0, 0),
    "B": (60, 2, 1.5, "smooth", 20.0, 0),
    "C": (5, 6, 1.0, "smooth", 20.0, 0),
    "D": (30, 3, 1.2, "smooth", 5.0, 0),
}
ROWS = [("A", 300), ("A", 1000), ("B", 1000), ("C", 1000), ("C", 3000), ("D", 1000)]
COLUMNS = {
    "snis": ("snis", {}),
    "dts, paper's weights": ("dts", {"weights": "multiset", "wave_size": 1}),
    "dts": ("dts", {"wave_size": 1}),
    "maxent_ts, k = 2": ("maxent_ts", {"expansion_k": 2, "wave_size": 1}),
    "residual_ts": ("residual_ts", {"wave_size": 1}),
    "residual_ts, waves of 8": ("residual_ts", {"wave_size": 8}),
}


def _search(
    toy: Toy, method: str, count: int, seed: int, options: dict[str, object]
) -> list[SearchResult]:
    process = TokenProcess(toy, toy.law, toy.length)
    problems = [SearchProblem(i, process.root([0]), toy) for i in range(count)]
    given = {"inverse_temperature": toy.inverse_temperature} | options
    runs = run_searches(process, problems, method=method, options=given, seed=seed, in_flight=512)
    return [run for _, run in runs if isinstance(run, SearchResult)]


def total_variation(
    name: str, method: str, num_rollouts: int, seed: int, options: dict[str, object]
) -> float:
    """TV of one search's distribution() to pi*."""
    toy = Toy(*TOYS[name])  # type: ignore[arg-type]
    (run,) = _search(toy, method, 1, seed, options | {"num_rollouts": num_rollouts})
    law = np.zeros(len(toy.target))
    for tokens, probability in run.distribution():
        law[toy.index(tokens)] += probability
    return float(0.5 * np.abs(law - toy.target).sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--output", type=Path, help="also write value error against depth here, for `sdt report`"
    )
    arguments = parser.parse_args()
    seeds = range(100, 100 + arguments.seeds)
    print("| toy, rollouts | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for name, count in ROWS:
        found = [
            np.mean([total_variation(name, method, count, seed, options) for seed in seeds])
            for method, options in COLUMNS.values()
        ]
        print(
            f"| {name} {count} | " + " | ".join(f"{value:.3f}" for value in found) + " |",
            flush=True,
        )
    toy = Toy(3, 3, 1.0, "smooth", 5.0, 1)
    for wave_size in (1, 4):
        runs = _search(toy, "residual_ts", 10_000, 1, {"num_rollouts": 8, "wave_size": wave_size})
        ratio = np.exp(np.array([run.log_z for run in runs], dtype=np.float64) - toy.log_z)
        error = ratio.std() / np.sqrt(len(ratio))
        print(
            f"\nE[Z-hat] / Z with 8 rollouts in waves of {wave_size}: {ratio.mean():.4f} +- {error:.4f}"
        )
    if arguments.output is not None:
        print(f"\nvalue error against depth: {value_errors().save(arguments.output)}")


def value_errors() -> ValueErrors:
    """Mean |v - V| by depth of one search of toy C for every tree method of the table."""
    toy = Toy(*TOYS["C"])
    curves = {}
    for label, (method, options) in COLUMNS.items():
        (run,) = _search(toy, method, 1, 100, options | {"num_rollouts": 1000})
        if run.tree is not None:
            curves[label] = value_error_by_depth(
                run.tree, toy, run.tree.soft_values(toy.inverse_temperature)
            )
    title = f"toy C ({toy.vocab_size} tokens, length {toy.length}, λ = {toy.inverse_temperature:g}), one search of 1,000 rollouts"
    return ValueErrors(title, curves)


if __name__ == "__main__":
    main()
