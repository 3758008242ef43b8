"""Result files of a run: append-only and durable lines, documents, and how they are read again.

config.yaml (resolved), environment.json (versions and hardware), problems.json, trees/ (the first problem's search of each
tree method), samples.jsonl (one line per problem and method), summary.json, truth.json, summary.md, figures/. A line is on
disk, synced, before its problem counts as done.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from sdt_dist.errors import ResultsError, SdtError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.search.result import SearchResult
from sdt_dist.tasks.task import ProblemT, Task
from sdt_dist.tree.snapshot import Snapshot

Line = dict[str, Any]
SavedT = TypeVar("SavedT", bound=BaseModel)
SAMPLES = "samples.jsonl"
CONFIG = "config.yaml"
PROBLEMS = "problems.json"
_HEAD = {"problem", "name", "method", "label", "seed", "status", "samples"}


def saved_config(directory: Path) -> EvaluationConfig:
    """The configuration of the run in a directory; ResultsError when it holds none of ours."""
    return read_saved(directory / CONFIG, EvaluationConfig, "sdt evaluate")


def read_saved(path: Path, kind: type[SavedT], command: str) -> SavedT:
    """The configuration in a file that a command wrote; ResultsError when it is absent or none of its."""
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ResultsError(
            f"output: {path} is no configuration that `{command}` wrote ({type(error).__name__}); give another directory."
        ) from error


def methods_by_label(directory: Path) -> dict[str, str]:
    """{label: method} of the run in a directory; ResultsError when it holds no configuration of ours."""
    return {method.label: method.name for method in saved_config(directory).method_configs()}


class ResultLog:
    """samples.jsonl: reads what is there, drops a torn last line, appends durably."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / SAMPLES
        self.lines = self._recover()

    def _recover(self) -> list[Line]:
        if not self.path.exists():
            return []
        try:
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                with self.path.open("r+b") as handle:
                    handle.truncate(len(whole))
            lines = [json.loads(line) for line in whole.splitlines()]
        except (OSError, ValueError) as error:
            raise ResultsError(
                f"output: {self.path} has a damaged line ({error}); move the file away."
            ) from error
        for number, line in enumerate(lines, start=1):
            if not isinstance(line, dict) or not line.keys() >= _HEAD:
                raise ResultsError(
                    f"output: {self.path} has a damaged line {number}; move the file away."
                )
        return lines

    def done(self) -> set[tuple[int, str]]:
        """(problem, label) pairs that need no more work."""
        return {(line["problem"], line["label"]) for line in self.lines}

    def append(self, line: Line) -> None:
        """Add one line and sync it. ResultsError when the disk refuses; a torn line is dropped on resume."""
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line, separators=(",", ":")) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise ResultsError(
                f"output: {self.path} cannot be written ({error.strerror}); free space and run again with --resume."
            ) from error
        self.lines.append(line)


def read_lines(directory: Path) -> list[Line]:
    """The lines of a run in the order of its methods and problems, whatever the order in which they ended.

    Tables, bootstrap intervals and figures come from these, so they do not depend on who finished first.
    """
    places = {label: place for place, label in enumerate(methods_by_label(directory))}
    return sorted(
        ResultLog(directory).lines,
        key=lambda line: (places.get(line["label"], len(places)), line["problem"]),
    )


def result_line(
    task: Task[ProblemT],
    problem: ProblemT,
    method: str,
    label: str,
    seed: int,
    outcome: SearchResult | SdtError,
) -> Line:
    """The line of one problem and method: all that is needed to compute every metric again."""
    head: Line = {
        "problem": problem.index,
        "name": problem.name,
        "method": method,
        "label": label,
        "seed": seed,
    }
    if isinstance(outcome, SdtError):
        return head | {
            "status": "failed",
            "error": str(outcome),
            "samples": [],
            "rewards": [],
            "weights": [],
        }
    cost = outcome.cost
    return head | {
        "status": "ok",
        "samples": [task.sample_record(sample) for sample in outcome.samples],
        "tokens": [list(sample.tokens) for sample in outcome.samples],
        "rewards": [sample.reward for sample in outcome.samples],
        "components": [sample.components for sample in outcome.samples],
        "log_probs": [sample.log_prob for sample in outcome.samples],
        "weights": outcome.weights,
        "best_reward": outcome.best.reward,
        "distinct_finished": len(outcome.finished),
        "log_z": outcome.log_z,
        "log_z_error": outcome.log_z_error,
        "log_z_unbiased": outcome.log_z_unbiased,
        "ess": outcome.ess,
        "exhausted": outcome.exhausted,
        "deterministic": outcome.deterministic,
        "flow": outcome.flow,
        "tree_stats": outcome.tree_stats,
        "nfe": cost.nfe,
        "model_calls": cost.model_calls,
        "rollouts": cost.rollouts,
        "reward_calls": cost.reward_calls,
        "recomputed_tokens": cost.recomputed_tokens,
        "wall_s": cost.wall_s,
    }


def tree_path(directory: Path, label: str) -> Path:
    """Where the first problem's tree of a method is kept."""
    return directory / "trees" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', label)}.npz"


def save_tree(directory: Path, label: str, snapshot: Snapshot) -> None:
    """Keep a search's tree beside the results. ResultsError when the disk refuses."""
    snapshot.save(tree_path(directory, label))


def problems_text(task: Task[ProblemT], problems: Sequence[ProblemT]) -> str:
    """problems.json: the problems with their truths, as the task records them."""
    return json.dumps([task.record(problem) for problem in problems])


def read_problems(directory: Path) -> list[Any]:
    """The problems of a run, of its task's own type; ResultsError when the directory holds none."""
    path = directory / PROBLEMS
    if not path.is_file():
        raise ResultsError(
            f"results: {directory} holds no {PROBLEMS}; give a directory that `sdt evaluate` wrote."
        )
    task = saved_config(directory).task
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [task.problem_of(record) for record in records]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ResultsError(
            f"results: {path} is damaged ({error}); give a directory that `sdt evaluate` wrote."
        ) from error
