"""Result files of a run: append-only and durable lines, atomic documents, and the check that a directory is ours.

config.yaml (resolved), problems.json, samples.jsonl (one line per problem and method), summary.json, truth.json,
summary.md, figures/. A line is on disk, synced, before its problem counts as done.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import ResultsError, SdtError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.search.result import SearchResult

Line = dict[str, Any]
SAMPLES, CONFIG, PROBLEMS = "samples.jsonl", "config.yaml", "problems.json"


def write_text(path: Path, text: str) -> None:
    """Write a whole file at once: beside it, synced, renamed. ResultsError when the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ResultsError(f"output: {path} cannot be written ({error.strerror}); finished work is kept.") from error


def open_directory(directory: Path, config: EvaluationConfig, *, resume: bool) -> None:
    """Prepare an output directory. ResultsError when it holds results and is not resumed, or another configuration's."""
    saved = directory / CONFIG
    if (directory / SAMPLES).exists() and not resume:
        raise ResultsError(f"output: {directory} already holds results; add --resume, or give another directory.")
    if saved.exists():
        before = yaml.safe_load(saved.read_text())
        known = EvaluationConfig.model_validate(before).identity() if isinstance(before, dict) else {}
        now = config.identity()
        different = sorted(key for key in now if known.get(key) != now[key])
        if different and (directory / SAMPLES).exists():
            field = different[0]
            raise ResultsError(
                f"output: {directory} holds results of another configuration ({field}: {known.get(field)!r}, now "
                f"{now[field]!r}); give another directory."
            )
    write_text(saved, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


class ResultLog:
    """samples.jsonl: reads what is there, drops a torn last line, appends durably."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / SAMPLES
        self.lines = self._recover()

    def _recover(self) -> list[Line]:
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as handle:
                handle.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError as error:
            raise ResultsError(f"output: {self.path} has a damaged line ({error}); move the file away.") from error

    def done(self) -> set[tuple[int, str]]:
        """(problem, label) pairs that need no more work."""
        return {(line["problem"], line["label"]) for line in self.lines}

    def append(self, line: Line) -> None:
        """Add one line and sync it. ResultsError when the disk refuses; a torn line is dropped on resume."""
        try:
            with self.path.open("a") as handle:
                handle.write(json.dumps(line, separators=(",", ":")) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise ResultsError(
                f"output: {self.path} cannot be written ({error.strerror}); free space and run again with --resume."
            ) from error
        self.lines.append(line)


def result_line(problem: ForecastProblem, method: str, label: str, seed: int, outcome: SearchResult | SdtError) -> Line:
    """The line of one problem and method: all that is needed to compute every metric again."""
    head: Line = {"problem": problem.index, "name": problem.name, "method": method, "label": label, "seed": seed}
    if isinstance(outcome, SdtError):
        return head | {"status": "failed", "error": str(outcome), "samples": [], "rewards": [], "weights": []}
    cost = outcome.cost
    return head | {
        "status": "ok",
        "samples": [_rounded(sample.series) for sample in outcome.samples],
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
        "tree_stats": outcome.tree_stats,
        "nfe": cost.nfe,
        "model_calls": cost.model_calls,
        "rollouts": cost.rollouts,
        "reward_calls": cost.reward_calls,
        "recomputed_tokens": cost.recomputed_tokens,
        "wall_s": cost.wall_s,
    }


def _rounded(series: np.ndarray | None) -> list[float]:
    return [] if series is None else [float(f"{value:.8g}") for value in series]


def write_problems(directory: Path, problems: list[ForecastProblem]) -> None:
    """problems.json: histories, truths and scales, in the user's units."""
    records = [
        {
            "index": p.index,
            "name": p.name,
            "history": p.history.tolist(),
            "truth": p.truth.tolist(),
            "season": p.season,
            "loc": p.loc,
            "scale": p.scale,
        }
        for p in problems
    ]
    write_text(directory / PROBLEMS, json.dumps(records))


def read_problems(directory: Path) -> list[ForecastProblem]:
    """What `write_problems` wrote; ResultsError when the directory holds no run."""
    path = directory / PROBLEMS
    if not path.is_file():
        raise ResultsError(f"results: {directory} holds no {PROBLEMS}; give a directory that `sdt evaluate` wrote.")
    records = json.loads(path.read_text())
    return [
        ForecastProblem(**(r | {"history": np.array(r["history"]), "truth": np.array(r["truth"])})) for r in records
    ]
