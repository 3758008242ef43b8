"""What each method of an evaluation is given: the shared settings and a matched budget, the nfe of about as many rollouts for all.

See docs/concepts/exactness.md#cost.
"""

from __future__ import annotations

from typing import Any

from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.search.methods import get_method
from sdt_dist.search.options import TreeOptions

# Tree rollouts start below the root, so this keeps their number within num_rollouts.
_BUDGET_SHARE = 0.95


def matched_budget(config: EvaluationConfig, num_rollouts: int | float) -> dict[str, Any]:
    """The options that bound a search by the nfe of about so many rollouts."""
    nfe = round(_BUDGET_SHARE * num_rollouts * config.horizon)
    return {"num_rollouts": num_rollouts, "max_nfe": max(config.horizon, nfe)}


def options_of(config: EvaluationConfig, method: MethodConfig) -> dict[str, Any]:
    """Options of one method: the shared settings, a matched budget unless it is a reference, then its own."""
    chosen = get_method(method.name)
    options: dict[str, Any] = {
        "inverse_temperature": config.inverse_temperature,
        "num_samples": config.num_samples,
    }
    if not chosen.reference:
        options |= matched_budget(config, config.num_rollouts)
    if issubclass(chosen.options, TreeOptions):
        options["wave_size"] = config.wave_size
    return options | method.options
