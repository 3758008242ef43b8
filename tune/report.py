"""What a sweep leaves beside its trials: best.yaml, heldout.yaml, pareto.json, sweep.md and figures (SPEC section 7).

All of it is made again from config.yaml, trials.jsonl and screening.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.evaluation.results import write_text
from tune.choice import (
    BEST,
    FEWEST,
    HELDOUT,
    best_trial,
    importances,
    points_of,
    rows_of,
    write_choice,
)
from tune.config import SweepConfig, front_axes, quality
from tune.figures import draw_sweep
from tune.ledger import TrialLine, read_trials
from tune.objectives import OBJECTIVES
from tune.screening import LEAST_ESS, Cell, Screen, agreement, read_screening

PARETO, REPORT = "pareto.json", "sweep.md"
_MOST_ROWS = 30


@dataclass(frozen=True, slots=True)
class Findings:
    """What the command says of a sweep at its end."""

    best: TrialLine | None
    trials: list[TrialLine]
    figures: list[Path]
    screened: dict[str, Any] | None


def write_report(output: Path, sweep: SweepConfig, problems: Sequence[ForecastProblem]) -> Findings:
    """Write everything that the trials that have ended support. ResultsError when the disk refuses."""
    trials, cells = read_trials(output), read_screening(output)
    best = best_trial(sweep, trials)
    if best is not None:
        write_choice(output, sweep, best)
    points = points_of(sweep, trials)
    write_text(output / PARETO, json.dumps([asdict(point) for point in points], indent=1))
    figures = draw_sweep(output, sweep, trials, cells)
    against = _against_screening(sweep, problems, trials) if cells and sweep.screen is not None else []
    name = quality(sweep.objectives)
    screened = agreement([paid for _, paid, _ in against], [c.objectives[name]["mean"] for _, _, c in against])
    parts = [
        *_head(sweep, trials, best, len(problems)),
        "### Trials",
        _trial_table(sweep, trials),
        "### Pareto front",
        _front_table(sweep, trials),
        *_importance_part(sweep, trials),
        *_screening_part(sweep, cells, against, screened),
    ]
    write_text(output / REPORT, "\n\n".join(parts) + "\n")
    return Findings(best, trials, figures, screened)


def _head(sweep: SweepConfig, trials: Sequence[TrialLine], best: TrialLine | None, count: int) -> list[str]:
    base, statuses = sweep.base, [line.status for line in trials]
    told = ", ".join(f"{statuses.count(status)} {status}" for status in ("finished", "stopped", "failed"))
    parts = [
        "# Sweep",
        f"Objectives, named beforehand: {', '.join(sweep.objectives)}. {len(trials)} trials ({told}) on {count} problems of "
        f"{base.dataset}, split {base.split}, horizon {base.horizon}; model {base.model}, reward `{base.reward}`.",
    ]
    if (
        {"inverse_temperature", "gamma"} <= set(sweep.space)
        and base.reward.startswith("spectral")
        and "+" not in base.reward
    ):
        parts.append("The reward has the spectral term alone, so only the product λγ matters to a sampler.")
    if best is None:
        return [*parts, "No trial was measured, so there is no best one."]
    low = OBJECTIVES[quality(sweep.objectives)]
    return [
        *parts,
        f"Best by {low.title}: trial `{best.trial}`, {_settings(best)}, {best.rollouts} rollouts: "
        f"{rows_of(best.objectives, [low.name])[0]}. Its interval is over problems and does not count that it is the best of "
        "many: judge it on other windows.",
        f"    sdt evaluate {BEST} --output results/best            # on the test split\n"
        f"    sdt evaluate {HELDOUT} --output results/heldout      # beside the defaults\n"
        "    python -m tune.heldout results/heldout               # the paired difference with its interval",
    ]


def _settings(line: TrialLine) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.parameters.items())


def _trial_table(sweep: SweepConfig, trials: Sequence[TrialLine]) -> str:
    """Trials by quality, those of larger budgets first; the first `_MOST_ROWS` of them."""
    name = quality(sweep.objectives)
    sign = OBJECTIVES[name].sign
    shown = list(dict.fromkeys([*sweep.objectives, "crps", "spec_w1_gap", "nfe"]))
    known = [line for line in trials if name in line.objectives]
    known.sort(key=lambda line: (-(line.rollouts or 0), sign * line.objectives[name]["mean"]))
    rows = [
        [line.trial, _settings(line), line.status, str(line.rollouts), *rows_of(line.objectives, shown)]
        for line in known[:_MOST_ROWS]
    ]
    failed = [f"\n`{line.trial}` failed: {line.error}" for line in trials if line.status == "failed"]
    titles = ["trial", "parameters", "status", "rollouts", *(OBJECTIVES[one].title for one in shown)]
    return table(titles, rows) + "\n".join(failed)


def _front_table(sweep: SweepConfig, trials: Sequence[TrialLine]) -> str:
    """The points that no other one beats in what the front is of."""
    axes = front_axes(sweep.objectives)
    front = [point for point in points_of(sweep, trials) if point.on_front]
    rows = [[p.trial, str(p.rollouts), *(f"{p.means[name]:.4g}" for name in axes)] for p in front]
    return f"Every trial at every budget it had counts; all of them are in {PARETO}.\n\n" + table(
        ["trial", "rollouts", *(OBJECTIVES[name].title for name in axes)], rows
    )


def _importance_part(sweep: SweepConfig, trials: Sequence[TrialLine]) -> list[str]:
    found = importances(sweep, trials)
    title = "### Importance"
    if not found:
        return [title, f"Not computed: it needs {FEWEST} trials that differ, and tells little below a few dozen."]
    at = " at the first budget, which all trials had" if sweep.rungs else ""
    text = (
        "fANOVA (Hutter et al. 2014, by Optuna): the share of the variance of the quality over the space that a forest fitted "
        f"to {len(trials)} trials gives to each parameter that all trials have{at}. With so many trials it is a hint, no test."
    )
    return [title, text, table(["parameter", "share"], [[name, f"{share:.2f}"] for name, share in found.items()])]


def _against_screening(
    sweep: SweepConfig, problems: Sequence[ForecastProblem], trials: Sequence[TrialLine]
) -> list[tuple[TrialLine, float, Cell]]:
    """Trials at the largest budget that several had, what was paid for and what screening says at their own lambda and gamma."""
    assert sweep.screen is not None
    name, base = quality(sweep.objectives), sweep.base
    held = [line for line in trials if name in line.objectives and line.status == "finished"]
    screen = Screen(sweep.screen, base, problems)
    return [
        (
            line,
            line.objectives[name]["mean"],
            screen.at(
                line.parameters.get("inverse_temperature", base.inverse_temperature), line.parameters.get("gamma")
            ),
        )
        for line in held
    ]


def _screening_part(
    sweep: SweepConfig,
    cells: Sequence[Cell],
    against: Sequence[tuple[TrialLine, float, Cell]],
    found: dict[str, Any] | None,
) -> list[str]:
    if not cells:
        return []
    name = quality(sweep.objectives)
    weak = sum(not cell.believable for cell in cells)
    rows = [_cell_row(cell, name) for cell in cells[:10]]
    rank = (
        "Too few finished trials to compare ranks."
        if found is None
        else f"Spearman's rank correlation of screened and paid {name}: {found['rho']:.2f} over {found['count']} finished trials."
    )
    compared = [
        [line.trial, _settings(line), f"{paid:.4g}", f"{cell.objectives[name]['mean']:.4g}", f"{cell.ess:.0f}"]
        for line, paid, cell in sorted(against, key=lambda one: one[1])
    ]
    return [
        "### Screening",
        f"{len(cells)} cells of λ × γ from the walks in `{sweep.screen}`, without a search; {weak} have a median ESS below "
        f"{LEAST_ESS:.0f} and are not believed. It speaks of residual_ts's kept walks at their own budget.",
        table(["λ", "γ", OBJECTIVES[name].title, "ESS", "least ESS", "believed"], rows),
        f"Against what was paid for, at the trials' own λ and γ. {rank}",
        table(["trial", "parameters", "paid", "screened", "ESS"], compared),
    ]


def _cell_row(cell: Cell, name: str) -> list[str]:
    gamma = "–" if cell.gamma is None else f"{cell.gamma:.4g}"
    value = f"{cell.objectives[name]['mean']:.4g}"
    believed = "yes" if cell.believable else "no"
    return [f"{cell.inverse_temperature:.4g}", gamma, value, f"{cell.ess:.0f}", f"{cell.least_ess:.1f}", believed]


def table(titles: list[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
