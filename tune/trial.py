"""One trial of a sweep: its parameters' evaluation at every budget, in a directory of its own, on the shared fleet.

A trial loads no model, no torch and no metrics (`measurer.py` has these). Its directory is named by its parameters, so that whoever makes it again, after a kill
or as another trial with the same parameters, finds every line that is on disk and searches only the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdt_dist.extras import packages_of

with packages_of("tune", "a sweep"):
    from filelock import FileLock
    from ray import tune as ray_tune

from sdt_dist.actors.evaluation import OnExchange
from sdt_dist.data.problems import ForecastProblem
from sdt_dist.evaluation.directory import RunDirectory
from sdt_dist.evaluation.plan import plan_on
from sdt_dist.evaluation.runner import search_all
from sdt_dist.files import write_text
from sdt_dist.tune.config import SweepConfig
from sdt_dist.tune.measurer import measure
from sdt_dist.tune.space import Parameters

PARAMETERS = "parameters.json"


@dataclass(frozen=True)
class Common:
    """What all trials of a sweep share. folder: the driver's working directory, against which paths are meant.

    exchange, measurer: handles of the actors behind which the fleet and the metrics are. ended: by name, the last budget of
    trials that had ended before this run.
    """

    sweep: SweepConfig
    problems: list[ForecastProblem]
    output: Path
    folder: Path
    exchange: Any
    measurer: Any
    ended: dict[str, int] = field(default_factory=dict)


def trial_name(parameters: Parameters) -> str:
    """The name of a trial, by its parameters alone."""
    text = json.dumps(parameters, sort_keys=True)
    return f"{parameters['method']}-{hashlib.blake2b(text.encode(), digest_size=5).hexdigest()}"


def trial_directory(output: Path, parameters: Parameters) -> Path:
    """Where a trial's evaluations are, one directory a budget."""
    return output / "trials" / trial_name(parameters)


def run_trial(config: dict[str, Any], common: Common) -> None:
    """Ray Tune's trainable: reports the objectives at each budget, with `rollouts` as the time that ASHA compares at.

    Every report has `begun`, the largest budget that an earlier making of the trial had begun (before a kill, or
    under the same parameters), 0 where there is none.
    """
    os.chdir(common.folder)
    sweep = common.sweep
    name = trial_name(config)
    directory = trial_directory(common.output, config)
    rungs: list[dict[str, Any]] = []
    with _alone(directory):
        write_text(directory / PARAMETERS, json.dumps(config))
        budgets = sweep.budgets(config)
        budgets = [
            rollouts for rollouts in budgets if rollouts <= common.ended.get(name, budgets[-1])
        ]
        begun = max(
            (rollouts for rollouts in budgets if (directory / str(rollouts)).exists()), default=0
        )
        for rollouts in budgets:
            plan = plan_on(sweep.evaluation_of(config, rollouts), common.problems)
            place = RunDirectory(directory / str(rollouts), plan, resume=True)
            executor = OnExchange(common.exchange, f"{name}/{rollouts}")
            search_all(plan, place, executor=executor)
            measured = measure(common.measurer, place.path)
            rungs.append({"rollouts": rollouts, "objectives": measured})
            means = {objective: found["mean"] for objective, found in measured.items()}
            ray_tune.report(
                {"rollouts": rollouts, "begun": begun, **means, "rungs": json.dumps(rungs)}
            )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """The trial's directory for one process at a time: another one with the same parameters waits and then finds all done."""
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        yield
