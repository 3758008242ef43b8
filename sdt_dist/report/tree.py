"""One problem of a run in a report: every method's forecast of it, and a saved search tree to click through.

It must not know how a report is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.results import tree_path
from sdt_dist.report.blocks import Block, Picture, Section, Text, TreeView
from sdt_dist.report.figures.run import Run
from sdt_dist.report.run import RunFiles
from sdt_dist.tree.snapshot import Snapshot

MAX_NODES = 1500
PROBLEM_FANS = "problem"
PROBLEM_TREE = "tree"
TREE_PROBLEM = 0  # the problem whose trees a run keeps


def labels_with_tree(run: Run) -> list[str]:
    """Labels of which the run kept the first problem's tree."""
    return [label for label in run.lines if tree_path(run.directory, label).is_file()]


def check_choice(
    runs: Sequence[RunFiles], problem: int | None, method: str | None, reference: str | None
) -> None:
    """ResultsError for a problem or label that none of the runs has."""
    if problem is not None and not any(problem in run.run.problems for run in runs):
        last = max((max(run.run.problems) for run in runs), default=-1)
        raise ResultsError(f"problem: {problem}, allowed: 0 to {last}, the problems of these runs.")
    known = dict.fromkeys(label for run in runs for label in run.table)
    for field, label in (("method", method), ("reference", reference)):
        if label is not None and label not in known:
            raise ResultsError(
                f"{field}: {label!r}, allowed: {', '.join(known)}, the methods of these runs."
            )


def _tree_label(run: Run, problem: int, method: str | None) -> str | None:
    """The method whose tree is shown: the given one, else the aligned one, else the first that has a tree; None without."""
    kept = labels_with_tree(run) if problem == TREE_PROBLEM else []
    wanted = [method] if method is not None else [run.aligned, *kept]
    return next((label for label in wanted if label in kept), None)


@dataclass(frozen=True, slots=True)
class Choice:
    """The problem of a run that is shown, and the label and nodes of its search tree, where one was kept."""

    problem: int
    method: str | None
    label: str | None
    tree: dict[str, Any]

    @classmethod
    def of(cls, files: RunFiles, problem: int | None, method: str | None) -> Choice:
        """The chosen problem, by default the first. CheckpointError for a damaged tree."""
        index = min(files.run.problems) if problem is None else problem
        label = _tree_label(files.run, index, method)
        return cls(index, method, label, {} if label is None else tree_data(files, label))


def problem_section(files: RunFiles, choice: Choice, drawn: Sequence[Path]) -> Section:
    """The chosen problem; `drawn` are the stems of a run's figures."""
    anchor = f"{files.key}-problem"
    if choice.problem not in files.run.problems:
        return Section(
            f"Problem {choice.problem}",
            anchor,
            [Text(f"This run has no problem {choice.problem}.")],
        )
    name = files.run.problems[choice.problem].name
    blocks: list[Block] = []
    stems = {stem.name: stem for stem in drawn}
    if PROBLEM_FANS in stems:
        blocks.append(Picture(stems[PROBLEM_FANS], f"Forecasts of {name} by every method."))
    if choice.label is None:
        blocks.append(Text(_no_tree(files.run, choice.problem, choice.method)))
    else:
        blocks.append(TreeView(choice.tree, stems[PROBLEM_TREE], _caption(choice.label)))
    return Section(f"Problem {choice.problem}: {name}", anchor, blocks)


def _no_tree(run: Run, problem: int, method: str | None) -> str:
    kept = labels_with_tree(run)
    exist = (
        f"of problem {TREE_PROBLEM} by {', '.join(f'`{known}`' for known in kept)}"
        if kept
        else "none"
    )
    asked = f" by `{method}`" if method is not None else ""
    return f"No search tree of problem {problem}{asked} was kept. Trees in this run: {exist}."


def _caption(label: str) -> str:
    return (
        f"Search tree of `{label}`. Rings can be opened and closed by a click; point at a node for its token, probability, value and visits. "
        "Line width: visits. Colour: soft value, from low (blue) to high (yellow). Branches that one walk made start closed."
    )


def tree_data(files: RunFiles, label: str) -> dict[str, Any]:
    """The most visited nodes of a saved tree as columns, parents before children.

    CheckpointError for a damaged file.
    """
    saved = Snapshot.load(tree_path(files.directory, label))
    tree = saved.tree
    nodes = saved.tree.nodes[: saved.tree.size]
    order = []
    place = {-1: -1}
    for node in np.sort(
        np.argsort(-nodes["visits"].astype(np.int64), kind="stable")[:MAX_NODES]
    ).tolist():
        if int(nodes["parent"][node]) in place:
            place[node] = len(order)
            order.append(node)
    values = tree.soft_values(saved.header["options"]["inverse_temperature"])
    meanings = {} if saved.blocks else series_values(files.run)
    return {
        "label": label,
        "size": tree.size,
        "parent": [place[int(nodes["parent"][n])] for n in order],
        "token": [int(nodes["token"][n]) for n in order],
        "means": [meanings.get(int(nodes["token"][n])) for n in order],
        "p": [_rounded(float(np.exp(nodes["log_prior"][n]))) for n in order],
        "value": [_rounded(float(values[n])) for n in order],
        "visits": [int(nodes["visits"][n]) for n in order],
        "terminal": [int(tree.is_terminal(n)) for n in order],
        "is_blocks": bool(saved.blocks),
    }


def series_values(run: Run) -> dict[int, float]:
    """{token: forecast value} as far as samples of the problem say it, where every token stands for one value."""
    found: dict[int, set[float]] = {}
    lines = [lines[TREE_PROBLEM] for lines in run.lines.values() if TREE_PROBLEM in lines]
    for line in lines:
        for tokens, series in zip(line["tokens"], line["samples"], strict=True):
            if len(tokens) == len(series):
                for token, value in zip(tokens, series, strict=True):
                    found.setdefault(token, set()).add(value)
    return {token: next(iter(values)) for token, values in found.items() if len(values) == 1}


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
