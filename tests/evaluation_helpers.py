"""Whole evaluation runs in a directory, for tests that look at what a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.directory import RunDirectory
from sdt_dist.evaluation.executor import Executor
from sdt_dist.evaluation.plan import load_config, make_plan
from sdt_dist.evaluation.runner import Progress, run_evaluation


def evaluate_into(
    path: Path,
    asked: EvaluationConfig | dict[str, Any] | str,
    *,
    executor: Executor | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> None:
    """The run of a configuration, of settings or of a YAML file; by this process unless there is an executor."""
    if isinstance(asked, str):
        asked = load_config(asked, {})
    elif isinstance(asked, dict):
        asked = load_config(None, asked)
    plan = make_plan(asked)
    output = RunDirectory(path, plan, resume=resume)
    run_evaluation(plan, output, executor=executor, progress=progress)
