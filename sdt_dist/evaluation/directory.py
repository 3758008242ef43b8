"""The output directory of a run: checked before the run is announced, written from the run's beginning on.

See docs/guides/evaluate.md#bad-input. What the files are is said in `results.py`.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.plan import Plan
from sdt_dist.evaluation.results import (
    CONFIG,
    PROBLEMS,
    SAMPLES,
    ResultLog,
    problems_text,
    saved_config,
)
from sdt_dist.files import write_text


class RunDirectory:
    """Where a plan's results go; to make one checks the directory and leaves it alone, `open` writes to it.

    ResultsError when the directory is not ours, or holds results that this run cannot go on from: not resumed, of another
    configuration, or of other data under the same name.
    """

    def __init__(self, path: Path, plan: Plan, *, resume: bool = False) -> None:
        self.path = path
        self._config = plan.config
        self._problems = problems_text(plan.config.task, plan.problems)
        has_results = (path / SAMPLES).exists()
        if has_results and not resume:
            raise ResultsError(
                f"output: {path} already holds results; add --resume, or give another directory."
            )
        if has_results or (path / CONFIG).exists():
            known = saved_config(path).identity()
            if has_results:
                self._check_same(known)

    def _check_same(self, known: dict[str, object]) -> None:
        """Refuse to go on with results of another configuration or other data."""
        now = self._config.identity()
        different = sorted(key for key in now if known[key] != now[key])
        if different:
            field = different[0]
            raise ResultsError(
                f"output: {self.path} holds results of another configuration ({field}: {known[field]!r}, now "
                f"{now[field]!r}); give another directory."
            )
        if _text(self.path / PROBLEMS) != self._problems:
            raise ResultsError(
                f"output: {self.path} holds results of other data: dataset {self._config.dataset!r} has changed since, or "
                f"{PROBLEMS} has; give another directory."
            )

    def open(self) -> ResultLog:
        """Write config.yaml and problems.json, and give the log. ResultsError when the disk refuses."""
        settings = self._config.model_dump(mode="json")
        write_text(self.path / CONFIG, yaml.safe_dump(settings, sort_keys=False))
        write_text(self.path / PROBLEMS, self._problems)
        return ResultLog(self.path)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
