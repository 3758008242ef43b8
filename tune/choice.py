"""What a sweep has found: its best trial, the Pareto front, what its parameters matter, and configurations to go on with.

Everything comes from trials.jsonl and config.yaml. It must not know Ray or searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.extras import packages_of
from sdt_dist.files import write_text
from sdt_dist.tune.config import SweepConfig, front_axes, quality
from sdt_dist.tune.ledger import TrialLine
from sdt_dist.tune.objectives import OBJECTIVES
from sdt_dist.tune.space import Domain, Parameters, kind_of

BEST = "best.yaml"
HELDOUT = "heldout.yaml"
CHOSEN = "chosen"
DEFAULTS = "defaults"
DEFAULT_METHOD = "snis"
FEWEST = 10  # trials below which importances are noise


@dataclass(frozen=True, slots=True)
class Point:
    """One trial at one budget: the means of what the front is of, and whether no other point is better in all of it."""

    trial: str
    parameters: Parameters
    rollouts: int
    means: dict[str, float]
    on_front: bool = False


def best_trial(sweep: SweepConfig, trials: Sequence[TrialLine]) -> TrialLine | None:
    """The trial with the best quality among those with the largest budget that any had; None where none was measured."""
    name = quality(sweep.objectives)
    measured = [line for line in trials if line.status != "failed" and name in line.objectives]
    if sweep.rungs is not None and measured:
        top = max(line.rollouts or 0 for line in measured)
        measured = [line for line in measured if line.rollouts == top]
    return min(
        measured,
        key=lambda line: OBJECTIVES[name].sign * line.objectives[name]["mean"],
        default=None,
    )


def points_of(sweep: SweepConfig, trials: Sequence[TrialLine]) -> list[Point]:
    """Every trial at every budget it had, cheapest first: each is a configuration that could be used."""
    axes = front_axes(sweep.objectives)
    found = [
        Point(
            line.trial,
            line.parameters,
            rung["rollouts"],
            {name: rung["objectives"][name]["mean"] for name in axes},
        )
        for line in trials
        for rung in line.rungs
    ]
    flagged = [replace(p, on_front=not any(_beats(q, p) for q in found)) for p in found]
    return sorted(
        flagged, key=lambda point: [OBJECTIVES[n].sign * point.means[n] for n in reversed(axes)]
    )


def _beats(one: Point, other: Point) -> bool:
    """Whether a point is nowhere worse, and somewhere better."""
    differences = [
        OBJECTIVES[name].sign * (one.means[name] - other.means[name]) for name in one.means
    ]
    return max(differences) <= 0 and min(differences) < 0


def common_values(
    sweep: SweepConfig, trials: Sequence[TrialLine]
) -> tuple[list[TrialLine], list[float]]:
    """Trials and their quality at the first budget, which all of them had; the only fair comparison where ASHA stops some."""
    name = quality(sweep.objectives)
    held = [line for line in trials if line.rungs and name in line.rungs[0]["objectives"]]
    return held, [line.rungs[0]["objectives"][name]["mean"] for line in held]


def importances(sweep: SweepConfig, trials: Sequence[TrialLine]) -> dict[str, float]:
    """fANOVA importance (Hutter et al. 2014) of the parameters that all trials have, by Optuna; {} for too few trials.

    The share of the variance of the quality over the space that a forest of trees, fitted to the trials, gives to each.
    """
    with packages_of("tune", "a sweep's report"):
        import optuna

    held, values = common_values(sweep, trials)
    if len(held) < FEWEST or np.ptp(values) == 0:
        return {}
    study = optuna.create_study()
    for line, value in zip(held, values, strict=True):
        domains = {
            name: _distribution(sweep, name, line.parameters["method"]) for name in line.parameters
        }
        study.add_trial(
            optuna.trial.create_trial(params=line.parameters, distributions=domains, value=value)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=sweep.seed)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}


def _distribution(sweep: SweepConfig, name: str, method: str) -> Any:
    with packages_of("tune", "a sweep's report"):
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

    domain: Domain = list(sweep.methods) if name == "method" else sweep.space[name]
    if isinstance(domain, list):
        return CategoricalDistribution(domain)
    if kind_of(name, method) is int:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(float(domain.low), float(domain.high), log=domain.log)


def chosen_evaluation(sweep: SweepConfig, best: TrialLine) -> EvaluationConfig:
    """The best trial's evaluation at its largest budget, on the test split."""
    return sweep.evaluation_of(
        best.parameters, best.rollouts or sweep.base.num_rollouts, split="test"
    )


def write_choice(output: Path, sweep: SweepConfig, best: TrialLine) -> None:
    """best.yaml, and heldout.yaml, in which the defaults stand beside it; `sdt evaluate` takes both as they are."""
    config = chosen_evaluation(sweep, best)
    head = f"# The best of {sweep.num_trials} trials by {quality(sweep.objectives)}, trial {best.trial}, on the test split.\n"
    write_text(output / BEST, head + _yaml(config.model_dump(mode="json")))
    note = f"# {CHOSEN}: as in {BEST}; {DEFAULTS}: what `sdt` does where nothing is said, at the same cost.\n"
    write_text(output / HELDOUT, note + _yaml(heldout_settings(config)))


def heldout_settings(config: EvaluationConfig) -> dict[str, Any]:
    """The settings of an evaluation of the chosen method beside the defaults.

    The default's own strength is an option of its method, and its reward a method's own where it differs.
    """
    plain = EvaluationConfig()
    (method,) = config.method_configs()
    defaults: dict[str, Any] = {
        "name": DEFAULT_METHOD,
        "label": DEFAULTS,
        "options": {"inverse_temperature": plain.inverse_temperature},
    }
    if config.reward != plain.reward:
        defaults["reward"] = plain.reward
    chosen = {
        key: value for key, value in method.model_dump(mode="json").items() if value is not None
    }
    return config.model_dump(mode="json") | {"methods": [chosen | {"label": CHOSEN}, defaults]}


def _yaml(settings: dict[str, Any]) -> str:
    kept = {
        key: value for key, value in settings.items() if value is not None or key == "num_problems"
    }
    return yaml.safe_dump(kept, sort_keys=False, default_flow_style=None)
