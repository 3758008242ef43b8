"""ASHA over growing budgets that still knows its rungs after `Tuner.restore` (Li et al. 2018, arXiv 1810.05934).

Ray saves no scheduler with an experiment (ray-project/ray issue 30838), so a resumed one would compare with nothing.
"""

from __future__ import annotations

import json
from typing import Any

from sdt_dist.extras import packages_of

with packages_of("tune", "a sweep"):
    from ray.tune.schedulers import ASHAScheduler

from sdt_dist.tune.config import SweepConfig
from sdt_dist.tune.objectives import OBJECTIVES


class GrowingBudgets(ASHAScheduler):
    """ASHA on the first objective, at rungs in rollouts; a trial that comes back brings the results that it had.

    A trial that is made again, as after a kill, is not stopped below a budget that it had begun (`begun` in its results): it had
    been let through, and what it has on disk, the end included, stays its own.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for rung in json.loads((trial.last_result or {}).get("rungs", "[]")):
            result = {"rollouts": rung["rollouts"]} | {
                k: v["mean"] for k, v in rung["objectives"].items()
            }
            self.on_trial_result(tune_controller, trial, result)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result["rollouts"] < result.get("begun", 0) else action


def scheduler_of(sweep: SweepConfig) -> GrowingBudgets | None:
    """The scheduler of a sweep; None where every trial has all its budgets."""
    if not sweep.asha or sweep.rungs is None:
        return None
    objective = OBJECTIVES[sweep.objectives[0]]
    return GrowingBudgets(
        time_attr="rollouts",
        metric=objective.name,
        mode=objective.mode,
        grace_period=sweep.rungs[0],
        reduction_factor=sweep.rungs[1] // sweep.rungs[0],
        max_t=sweep.rungs[-1],
    )
