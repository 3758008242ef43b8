"""What a sweep leaves beside its trials: best.yaml, heldout.yaml, pareto.json, its report and figures.

See docs/guides/sweeps.md.

All of it is made again from config.yaml, trials.jsonl and screening.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.evaluation.results import CONFIG
from sdt_dist.files import write_text
from sdt_dist.report.blocks import (
    Block,
    Bullets,
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
from sdt_dist.report.blocks import Cell as Entry
from sdt_dist.report.html import to_html
from sdt_dist.report.markdown import to_markdown
from sdt_dist.tune.choice import (
    BEST,
    FEWEST,
    HELDOUT,
    Point,
    best_trial,
    importances,
    points_of,
    write_choice,
)
from sdt_dist.tune.config import PAGE, SweepConfig, front_axes, quality
from sdt_dist.tune.figures import draw_sweep
from sdt_dist.tune.ledger import TrialLine, read_trials
from sdt_dist.tune.objectives import OBJECTIVES
from sdt_dist.tune.screening import LEAST_ESS, Cell, Screen, agreement, read_screening

PARETO = "pareto.json"
_MOST_ROWS = 30
_MOST_CELLS = 10
_GREEK = {"inverse_temperature": "λ", "gamma": "γ", "alpha": "α"}
_CAPTIONS = {
    "history": "Trials in the order of their ends, at every budget that they had.",
    "pareto": "Every trial at every budget that it had. The steps go through those that no other one beats.",
    "importance": "Shares of the variance of the quality over the space.",
    "tilt": "Trials over λ and γ, of all methods, at the first budget.",
    "screening": "Screened cells of λ × γ.",
}


@dataclass(frozen=True, slots=True)
class Findings:
    """What the command says of a sweep at its end."""

    best: TrialLine | None
    trials: list[TrialLine]
    figures: list[Path]
    screened: dict[str, Any] | None


def write_report(output: Path, sweep: SweepConfig, problems: Sequence[ForecastProblem]) -> Findings:
    """Write everything that the trials that have ended support. ResultsError when the disk refuses."""
    trials = read_trials(output)
    cells = read_screening(output)
    best = best_trial(sweep, trials)
    if best is not None:
        write_choice(output, sweep, best)
    points = points_of(sweep, trials)
    shares = importances(sweep, trials)
    write_text(output / PARETO, json.dumps([asdict(point) for point in points], indent=1))
    figures = draw_sweep(output, sweep, trials, points, shares, cells)
    against = (
        _against_screening(sweep, problems, trials) if cells and sweep.screen is not None else []
    )
    name = quality(sweep.objectives)
    screened = agreement(
        [paid for _, paid, _ in against], [c.objectives[name]["mean"] for _, _, c in against]
    )
    pictures = {path.stem: path.with_suffix("") for path in figures}
    sections = [
        Section("Result", "result", _result(sweep, trials, best, len(problems))),
        Section("Trials", "trials", [*_picture(pictures, "history"), *_trials(sweep, trials)]),
        Section("Pareto front", "front", [*_picture(pictures, "pareto"), *_front(sweep, points)]),
        Section(
            "Importance",
            "importance",
            [*_picture(pictures, "importance"), *_importance(sweep, shares, len(trials))],
        ),
    ]
    if "tilt" in pictures:
        sections.append(Section("λ and γ", "tilt", _picture(pictures, "tilt")))
    if cells:
        sections.append(
            Section(
                "Screening",
                "screening",
                [
                    *_picture(pictures, "screening"),
                    *_screening(sweep, cells),
                    *_compared(sweep, against, screened),
                ],
            )
        )
    sections.append(
        Section("How it was made", "made", [Code((output / CONFIG).read_text(encoding="utf-8"))])
    )
    subtitle = f"Made by sdt-dist {version('sdt-dist')} from trials.jsonl."
    write_text(
        output / "sweep.md",
        to_markdown("Sweep", [Section("", "", [Text(subtitle)]), *sections], output),
    )
    write_text(output / PAGE, to_html("Sweep", subtitle, sections))
    return Findings(best, trials, figures, screened)


def _picture(pictures: Mapping[str, Path], name: str) -> list[Block]:
    return [Picture(pictures[name], _CAPTIONS[name])] if name in pictures else []


def _result(
    sweep: SweepConfig, trials: Sequence[TrialLine], best: TrialLine | None, count: int
) -> list[Block]:
    base = sweep.base
    statuses = [line.status for line in trials]
    told = ", ".join(
        f"{statuses.count(status)} {status}" for status in ("finished", "stopped", "failed")
    )
    parts: list[Block] = [
        Text(
            f"Objectives, named beforehand: {', '.join(sweep.objectives)}. {len(trials)} trials ({told}) on {count} problems of "
            f"{base.dataset}, split {base.split}, horizon {base.horizon}; model {base.model}, reward `{base.reward}`."
        )
    ]
    if (
        {"inverse_temperature", "gamma"} <= set(sweep.space)
        and base.reward.startswith("spectral")
        and "+" not in base.reward
    ):
        parts.append(
            Text(
                "The reward has the spectral term alone, so only the product λγ matters to a sampler."
            )
        )
    if best is None:
        return [*parts, Text("No trial was measured, so there is no best one.")]
    low = OBJECTIVES[quality(sweep.objectives)]
    found = best.objectives[low.name]
    return [
        *parts,
        Text(
            f"Best by {low.title}: `{best.trial}` ({best.parameters['method']}, {_settings(best)}), {best.rollouts} rollouts: "
            f"{found['mean']:.4g} [{found['low']:.4g}, {found['high']:.4g}]. Its interval is over problems and does not count that it is the best "
            "of many: judge it on other windows."
        ),
        Code(
            f"{f'sdt evaluate {BEST} --output results/best':52}# on the test split\n"
            f"{f'sdt evaluate {HELDOUT} --output results/heldout':52}# beside the defaults\n"
            f"{'python -m sdt_dist.tune.heldout results/heldout':52}# the paired difference with its interval",
            language="sh",
        ),
    ]


def _settings(line: TrialLine) -> str:
    """The parameters of a trial beside its method."""
    own = {
        _GREEK.get(name, name): value for name, value in line.parameters.items() if name != "method"
    }
    return (
        ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in own.items())
        or "–"
    )


def _trials(sweep: SweepConfig, trials: Sequence[TrialLine]) -> list[Block]:
    """Trials by quality, those of larger budgets first; the first `_MOST_ROWS` of them, and why others failed."""
    name = quality(sweep.objectives)
    sign = OBJECTIVES[name].sign
    known = [line for line in trials if name in line.objectives]
    known.sort(key=lambda line: (-(line.rollouts or 0), sign * line.objectives[name]["mean"]))
    shown = known[:_MOST_ROWS]
    names = list(dict.fromkeys([*sweep.objectives, "crps", "spec_w1_gap", "nfe"]))
    columns = [
        text_cells([_settings(line) for line in shown]),
        text_cells([line.status for line in shown]),
        number_cells("rollouts", [line.rollouts for line in shown]),
        *(interval_cells(one, [line.objectives.get(one) for line in shown]) for one in names),
    ]
    titles = ["parameters", "status", "rollouts", *(OBJECTIVES[one].title for one in names)]
    blocks: list[Block] = [
        _grid("trials", "trial", titles, [line.trial for line in shown], columns)
    ]
    if len(known) > len(shown):
        blocks.append(
            Text(f"The best {len(shown)} of {len(known)}; all of them are in trials.jsonl.")
        )
    failed = [f"`{line.trial}` failed: {line.error}" for line in trials if line.status == "failed"]
    return [*blocks, *([Bullets(failed)] if failed else [])]


def _front(sweep: SweepConfig, points: Sequence[Point]) -> list[Block]:
    """The points that no other one beats in what the front is of."""
    axes = front_axes(sweep.objectives)
    front = [point for point in points if point.on_front]
    columns = [
        number_cells("rollouts", [point.rollouts for point in front]),
        *(number_cells(name, [point.means[name] for point in front]) for name in axes),
    ]
    titles = ["rollouts", *(OBJECTIVES[name].title for name in axes)]
    return [
        _grid("front", "trial", titles, [point.trial for point in front], columns),
        Text(f"Every trial at every budget it had counts; all of them are in {PARETO}."),
    ]


def _importance(sweep: SweepConfig, found: Mapping[str, float], count: int) -> list[Block]:
    if not found:
        return [
            Text(
                f"Not computed: it needs {FEWEST} trials that differ, and tells little below a few dozen."
            )
        ]
    at = " at the first budget, which all trials had" if sweep.rungs else ""
    return [
        _grid(
            "importance",
            "parameter",
            ["share"],
            list(found),
            [number_cells("share", list(found.values()))],
        ),
        Text(
            "fANOVA (Hutter et al. 2014, by Optuna): the share of the variance of the quality over the space that a forest fitted "
            f"to {count} trials gives to each parameter that all trials have{at}. With so many trials it is a hint, no test."
        ),
    ]


def _against_screening(
    sweep: SweepConfig, problems: Sequence[ForecastProblem], trials: Sequence[TrialLine]
) -> list[tuple[TrialLine, float, Cell]]:
    """Trials at the largest budget that several had, what was paid for and what screening says at their own lambda and gamma."""
    assert sweep.screen is not None
    name = quality(sweep.objectives)
    base = sweep.base
    held = [line for line in trials if name in line.objectives and line.status == "finished"]
    screen = Screen(sweep.screen, base, problems)
    return [
        (
            line,
            line.objectives[name]["mean"],
            screen.at(
                line.parameters.get("inverse_temperature", base.inverse_temperature),
                line.parameters.get("gamma"),
            ),
        )
        for line in held
    ]


def _screening(sweep: SweepConfig, cells: Sequence[Cell]) -> list[Block]:
    """The best cells of the grid, and how many are not believed."""
    name = quality(sweep.objectives)
    shown = cells[:_MOST_CELLS]
    columns = [
        number_cells("gamma", [cell.gamma for cell in shown]),
        interval_cells(name, [cell.objectives[name] for cell in shown]),
        number_cells("ess", [cell.ess for cell in shown]),
        number_cells("least_ess", [cell.least_ess for cell in shown]),
        text_cells(["yes" if cell.believable else "no" for cell in shown]),
    ]
    titles = ["γ", OBJECTIVES[name].title, "ESS", "least ESS", "believed"]
    weak = sum(not cell.believable for cell in cells)
    return [
        _grid(
            "screening", "λ", titles, [f"{cell.inverse_temperature:.4g}" for cell in shown], columns
        ),
        Text(
            f"The first {len(shown)} of {len(cells)} cells of λ × γ from the walks in `{sweep.screen}`, without a search; {weak} have "
            f"a median ESS below {LEAST_ESS:.0f} and are not believed. It speaks of residual_ts's kept walks at their own budget."
        ),
    ]


def _compared(
    sweep: SweepConfig,
    against: Sequence[tuple[TrialLine, float, Cell]],
    found: dict[str, Any] | None,
) -> list[Block]:
    """What was paid for beside what screening says of it."""
    name = quality(sweep.objectives)
    if found is None:
        return [Text("Too few finished trials to compare ranks with what was paid for.")]
    ordered = sorted(against, key=lambda one: one[1])
    columns = [
        text_cells([_settings(line) for line, _, _ in ordered]),
        number_cells("paid", [paid for _, paid, _ in ordered]),
        number_cells("screened", [cell.objectives[name]["mean"] for _, _, cell in ordered]),
        number_cells("ess", [cell.ess for _, _, cell in ordered]),
    ]
    return [
        Text(
            f"Against what was paid for, at the trials' own λ and γ: Spearman's rank correlation of screened and paid {name} is "
            f"{found['rho']:.2f} over {found['count']} finished trials."
        ),
        _grid(
            "compared",
            "trial",
            ["parameters", "paid", "screened", "ESS"],
            [line.trial for line, _, _ in ordered],
            columns,
        ),
    ]


def _grid(
    name: str,
    corner: str,
    titles: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[Sequence[Entry]],
) -> Grid:
    cells = by_rows(columns) if rows else []
    return Grid(
        name,
        corner,
        titles,
        [Row(title, row, label=title) for title, row in zip(rows, cells, strict=True)],
    )
