"""What a run will do: its configuration read, expanded and checked before a model loads, its problems cut, its rewards tried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.data.problems import ForecastProblem, load_problems
from sdt_dist.errors import ConfigurationError, SdtError
from sdt_dist.evaluation.ablation import check_points, expanded
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.evidence import evidence_files
from sdt_dist.files import read_mapping
from sdt_dist.parts import SeriesPart
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.base import Reward
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import RewardFactory, parse_reward
from sdt_dist.search.methods import get_method, validate_options
from sdt_dist.search.options import parse_options


def load_config(path: str | None, overrides: dict[str, Any]) -> EvaluationConfig:
    """Configuration from a YAML file (None: defaults) with overrides, its ablation expanded.

    ConfigurationError names the bad field.
    """
    values: Any = {}
    if path is not None:
        values = read_mapping(Path(path), "config")
    config = expanded(parse_options(EvaluationConfig, values | overrides, "an evaluation"))
    check_config(config)
    return (
        config
        if config.flow is None
        else config.model_copy(update={"flow_identity": config.flow_files().identity})
    )


def check_config(config: EvaluationConfig) -> None:
    """Everything that can be refused without loading a model or data."""
    from sdt_dist.data import check_dataset
    from sdt_dist.models.spec import check_spec
    from sdt_dist.search.sharing_plan import check_sharing

    for method in config.method_configs():
        options = validate_options(method.name, config.options_of(method))
        method.check_flow(config.flow is not None)
        check_sharing(
            method.name, options, config.searchers_per_problem, config.warm_start is not None
        )
    _check_evidence(config)
    labels = [method.label for method in config.method_configs()]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(f"methods: labels {labels} must differ; give each its own label.")
    check_points(config)
    check_dataset(config.dataset)
    _check_flow(config)
    check_spec(config.model)
    for reward in dict.fromkeys([config.reward, *map(config.reward_of, config.method_configs())]):
        _check_reward(config, reward)
    if config.context_length < config.horizon:
        raise ConfigurationError(
            f"context_length: {config.context_length}, must be >= the horizon of {config.horizon}, because spectra compare "
            "a forecast with as long a piece of its history."
        )


def _check_reward(config: EvaluationConfig, spec: str) -> None:
    from sdt_dist.rewards.spec import parse_reward

    reward = parse_reward(spec)
    if not reward.scores_forecasts:
        raise ConfigurationError(
            f"reward: {spec!r} scores text; an evaluation of forecasts needs series."
        )
    reward.check_horizon(config.horizon)


def _check_flow(config: EvaluationConfig) -> None:
    """Everything of a flow but whether it was trained for the model, which is not loaded here."""
    from sdt_dist.models.spec import check_flow_backend

    if config.flow is None:
        if config.flow_identity is not None:
            raise ConfigurationError(
                "flow_identity: given, but no flow; give --flow PATH, or leave it out."
            )
        return
    users = [method for method in config.method_configs() if method.uses_flow]
    if not users:
        raise ConfigurationError(
            f"flow: {config.flow!r}, but none of the methods {', '.join(m.label for m in config.method_configs())} uses it; "
            "add s_adt, snis+flow or smc+flow to methods, or leave it out."
        )
    check_flow_backend(config.model)
    head = config.flow_files().head
    for method in users:
        head.check_use(
            config.reward_of(method),
            config.options_of(method)["inverse_temperature"],
            config.horizon,
        )


def _check_evidence(config: EvaluationConfig) -> None:
    from sdt_dist.search.sharing_plan import SHARING_METHODS

    names = {method.name for method in config.method_configs()}
    if config.keep_evidence and not names.intersection(SHARING_METHODS):
        raise ConfigurationError(
            f"keep_evidence: true, but the methods {sorted(names)} have none to keep; allowed with: "
            f"{', '.join(SHARING_METHODS)}."
        )
    if config.warm_start is not None:
        evidence_files(config.warm_start)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do: problems by method that are still to be searched, and its cost in nfe."""

    config: EvaluationConfig
    problems: list[ForecastProblem]

    def nfe(self) -> int:
        """Upper estimate of the next-token distributions the whole run computes."""
        total = 0
        for method in self.config.method_configs():
            options = self.config.options_of(method)
            if method.name == "greedy":
                per_problem = self.config.horizon
            elif get_method(method.name).reference:
                per_problem = options["num_samples"] * self.config.horizon
            else:
                per_problem = options["max_nfe"]
            total += per_problem * len(self.problems)
        return total


def make_plan(config: EvaluationConfig) -> Plan:
    """Expand an ablation, load the data (no model), cut the problems and try the methods' rewards on them.

    Raises DataError, ContextError, ConfigurationError or, when a reward works on no problem, RewardError.
    """
    config = expanded(config)
    problems = load_problems(
        config.dataset,
        horizon=config.horizon,
        context_length=config.context_length,
        num_problems=config.num_problems,
        split=config.split,
        stride=config.stride,
        channels=config.channels,
    )
    for reward in dict.fromkeys(map(config.reward_of, config.method_configs())):
        _try_rewards(parse_reward(reward), problems, config.horizon)
    return Plan(config, problems)


def try_reward(factory: RewardFactory, history: np.ndarray, horizon: int) -> Reward:
    """The reward of a history [L], after it scored the history's end as if that were a forecast [horizon].

    So a reward that can score no such forecast is refused before anything is searched, with its own SdtError.
    """
    factory.check_horizon(horizon)
    reward = factory.build(RewardContext.of((SeriesPart(history),)))
    reward.score([Decoded((), series=np.resize(history[-horizon:], horizon).astype(np.float64))])
    return reward


def _try_rewards(factory: RewardFactory, problems: list[ForecastProblem], horizon: int) -> None:
    """The first problem's error when no problem's reward works; where one does, a run records the others as failed."""
    first: SdtError | None = None
    for problem in problems:
        try:
            try_reward(factory, problem.history, horizon)
        except SdtError as error:
            first = first or error
        else:
            return
    if first is not None:
        raise first
