"""trials.jsonl: one line a trial that has ended, rewritten whole at every end, so that it is never torn.

See docs/guides/sweeps.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdt_dist.extras import packages_of

with packages_of("tune", "a sweep"):
    from ray.tune import Callback

from sdt_dist.errors import ResultsError
from sdt_dist.files import write_text
from sdt_dist.tune.config import TRIALS
from sdt_dist.tune.objectives import Measured
from sdt_dist.tune.space import Parameters
from sdt_dist.tune.trial import trial_name


@dataclass(frozen=True, slots=True)
class TrialLine:
    """A trial that has ended. status: finished (its largest budget), stopped (before it, by ASHA) or failed.

    rungs: every budget that it had, with its objectives; rollouts and objectives are those of the last.
    """

    trial: str
    status: str
    parameters: Parameters
    rollouts: int | None
    objectives: Measured
    nfe: float | None
    rungs: list[dict[str, Any]]
    error: str | None = None


def line_of(
    parameters: Parameters,
    result: dict[str, Any] | None,
    largest: int | None,
    error: str | None = None,
) -> TrialLine:
    """The line of a trial with this last result; `largest` is its largest budget."""
    rungs = json.loads((result or {}).get("rungs", "[]"))
    last = rungs[-1] if rungs else {"rollouts": None, "objectives": {}}
    status = (
        "failed" if error is not None else "finished" if last["rollouts"] == largest else "stopped"
    )
    nfe = last["objectives"].get("nfe", {}).get("mean")
    return TrialLine(
        trial_name(parameters),
        status,
        parameters,
        last["rollouts"],
        last["objectives"],
        nfe,
        rungs,
        error,
    )


def write_trials(output: Path, lines: Iterable[TrialLine]) -> None:
    """Put lines into the ledger, in the place of those that it has of the same trials; one line a set of parameters."""
    unique = {line.trial: line for line in [*read_trials(output), *lines]}
    write_text(
        output / TRIALS, "".join(json.dumps(asdict(line)) + "\n" for line in unique.values())
    )


def read_trials(output: Path) -> list[TrialLine]:
    """The trials that have ended; none where no trial has."""
    path = output / TRIALS
    if not path.exists():
        return []
    try:
        return [
            TrialLine(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()
        ]
    except (OSError, ValueError, TypeError) as error:
        raise ResultsError(
            f"output: {path} is damaged ({error}); delete it and run again with --resume."
        ) from error


class Ledger(Callback):
    """Keeps trials.jsonl while a sweep runs. It is pickled with the tuner, so it holds a path and budgets only."""

    def __init__(self, output: Path, rungs: list[int] | None) -> None:
        self._output = output
        self._largest = None if rungs is None else rungs[-1]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._write([one for one in trials if one.is_finished() or one is trial])

    on_trial_error = on_trial_complete

    def _write(self, ended: list[Any]) -> None:
        write_trials(self._output, (self._line(one) for one in ended))

    def _line(self, trial: Any) -> TrialLine:
        error = None if trial.status != "ERROR" else "see its error.txt"
        largest = self._largest or (trial.last_result or {}).get("rollouts")
        return line_of(trial.config, trial.last_result, largest, error)
