"""What several runs say next to each other: measures and costs side by side, and what changed from the first to the others.

It must not know how a report is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdt_dist.evaluation.environment import backends_of, environment_facts
from sdt_dist.evaluation.significance import Pairs, between_runs
from sdt_dist.evaluation.tables import columns_of_tests
from sdt_dist.report.blocks import (
    Block,
    Bullets,
    Cell,
    Grid,
    Row,
    Section,
    Text,
    by_rows,
    interval_cells,
    number_cells,
    text_cells,
)
from sdt_dist.report.differences import differences_grid, explain, in_words
from sdt_dist.report.run import RunFiles, cost_mean, ms_per_nfe

_MEASURES = {
    "crps": ("CRPS", "lower"),
    "log_l1": ("log-L1", "near the truth's"),
    "reward_mean": ("reward", "higher"),
}
_COSTS = {
    "nfe": ("NFE", "matched"),
    "model_calls": ("model calls", "fewer"),
    "wall_s": ("s/problem", "lower"),
}


def sections_of_several(runs: Sequence[RunFiles]) -> list[Section]:
    """Side by side, and what changed between the first run and each other one; nothing of a single run."""
    if len(runs) < 2:
        return []
    changes = [_changed(number, runs[0], after) for number, after in enumerate(runs[1:], start=1)]
    return [
        *changes,
        Section("Side by side", "side-by-side", [side_by_side(runs), Text(_EXPLANATION)]),
    ]


_EXPLANATION = (
    "Means with 95% intervals, and costs a problem, of methods in every run. Seconds also depend on the machine and on what else ran there; "
    "NFE does not."
)


def side_by_side(runs: Sequence[RunFiles]) -> Grid:
    """One row a method and run: who answered, measures and costs."""
    labels = dict.fromkeys(label for run in runs for label in run.table)
    pairs = [(label, run) for label in labels for run in runs if label in run.table]
    columns: list[list[Cell]] = [text_cells(backends_of(run.environment) for _, run in pairs)]
    columns += [
        interval_cells(m, [run.summary[label].get(m) for label, run in pairs]) for m in _MEASURES
    ]
    columns += [
        number_cells(m, [cost_mean(run.table, label, m) for label, run in pairs]) for m in _COSTS
    ]
    columns.append(
        number_cells("ms_per_nfe", [ms_per_nfe(run.table, label) for label, run in pairs])
    )
    rows = [
        Row(f"{label}, {run.name}", row, run.key, label)
        for (label, run), row in zip(pairs, by_rows(columns), strict=True)
    ]
    named = [("answered by", ""), *_MEASURES.values(), *_COSTS.values(), ("ms per NFE", "lower")]
    return Grid(
        "side_by_side", "method, run", [t for t, _ in named], rows, [hint for _, hint in named]
    )


def same_problems(before: RunFiles, after: RunFiles) -> Pairs:
    """Indices in both runs of problems with the same name, history and truth."""
    by_name = {problem.name: problem for problem in before.run.problems.values()}
    return [
        (known.index, problem.index)
        for problem in after.run.problems.values()
        if (known := by_name.get(problem.name)) is not None
        and np.array_equal(known.truth, problem.truth)
    ]


def _changed(number: int, before: RunFiles, after: RunFiles) -> Section:
    title = f"What changed from {before.name} to {after.name}"
    return Section(
        title, f"changed-{number}", [*_settings(before, after), *_measures(before, after)]
    )


def _settings(before: RunFiles, after: RunFiles) -> list[Block]:
    """A table of the settings, versions and machines that differ."""
    rows = [
        Row(field, text_cells([old, new]))
        for field, (old, new) in _differences(before, after).items()
    ]
    if not rows:
        return [
            Text(
                "Both runs have the same configuration, versions and hardware as far as they noted them."
            )
        ]
    return [Grid("settings", "setting", [before.name, after.name], rows)]


def _differences(before: RunFiles, after: RunFiles) -> dict[str, tuple[str, str]]:
    old, new = (run.config.model_dump(mode="json") for run in (before, after))
    found = {
        field: (_plain(old[field]), _plain(new[field])) for field in new if old[field] != new[field]
    }
    if before.environment and after.environment:
        made = [environment_facts(run.environment[-1]) for run in (before, after)]
        names = dict.fromkeys(name for facts in made for name in facts)
        sides = {name: (made[0].get(name, "–"), made[1].get(name, "–")) for name in names}
        found |= {name: pair for name, pair in sides.items() if pair[0] != pair[1]}
    return found


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return (
        str(value["label"] or value["name"])
        if isinstance(value, dict)
        else "–"
        if value is None
        else str(value)
    )


def _measures(before: RunFiles, after: RunFiles) -> list[Block]:
    """Paired differences of the methods that both have, in words and as a table."""
    pairs = same_problems(before, after)
    if not pairs:
        return [
            Text(
                "The runs share no problem (same name and same truth), so they are unpaired: differences between them are also differences "
                "between their problems, and none is tested. Their means are side by side below."
            )
        ]
    task = after.config.task
    differences = between_runs(before.table, after.table, pairs, task.tested)
    found = {label: row for label, row in differences.items() if row}
    if not found:
        return [
            Text("The runs share no method that solved a shared problem, so nothing is compared.")
        ]
    left_out = max(len(before.run.problems), len(after.run.problems)) - len(pairs)
    count = f"{len(pairs)} problems are in both runs" + (
        f"; up to {left_out} others are left out." if left_out else "."
    )
    return [
        Text(f"{count} {_alike(before, after, list(found), pairs)}"),
        Bullets(in_words(found, columns_of_tests(task), f" in {after.name}")),
        differences_grid(found, columns_of_tests(task), "changes", after.key),
        Text(explain(found, f"{after.name} minus {before.name} on the same problem")),
    ]


def _alike(before: RunFiles, after: RunFiles, labels: list[str], pairs: Pairs) -> str:
    """How many searches that both runs made returned the very same samples."""
    both = [
        (old["samples"], new["samples"])
        for label in labels
        for known, index in pairs
        if (old := before.run.lines[label].get(known)) is not None
        and (new := after.run.lines[label].get(index)) is not None
    ]
    same = sum(old == new for old, new in both)
    return f"Of the {len(both)} searches that both made, {same or 'none'} returned the very same samples."
