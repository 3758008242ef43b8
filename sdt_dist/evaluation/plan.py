"""What a run will do: every method resolved once, problems cut, rewards tried, all of it before a model loads.

See docs/guides/evaluate.md, docs/guides/evaluate.md#bad-input. `load_config` reads what a user wrote, `resolve` says what that
means for each method, `make_plan` adds the problems. Whatever runs or records searches takes the Plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.data import check_dataset
from sdt_dist.data.problems import ForecastProblem, load_problems
from sdt_dist.errors import SdtError
from sdt_dist.evaluation import checks
from sdt_dist.evaluation.ablation import check_points, expanded
from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.evaluation.method_options import options_of
from sdt_dist.files import read_mapping
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.loading import check_spec
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.base import Reward
from sdt_dist.rewards.spec import RewardContext, RewardFactory, parse_reward
from sdt_dist.search.methods import get_method
from sdt_dist.search.options import parse_options
from sdt_dist.search.sharing_plan import SHARING_METHODS


@dataclass(frozen=True, slots=True)
class PlannedMethod:
    """One column of the comparison, resolved: nothing of it is looked up, parsed or checked again.

    options: those of its searches, the budget among them. flow: identity of the flow that it proposes with. is_reference:
    a line outside the matched budget. has_walks: whether its searches can share walks, start from kept ones and keep theirs.
    """

    label: str
    name: str
    options: dict[str, Any]
    reward: RewardFactory
    flow: str | None
    is_reference: bool
    has_walks: bool

    def nfe(self, horizon: int) -> int:
        """Upper estimate of the next-token distributions that a search computes."""
        if self.name == "greedy":
            return horizon
        if self.is_reference:
            return self.options["num_samples"] * horizon
        return self.options["max_nfe"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    config: what the user asked for, in the form by which runs are compared. flow: the files of the flow that methods
    propose with; None where none does, or where whoever searches holds it already.
    """

    config: EvaluationConfig
    methods: tuple[PlannedMethod, ...]
    problems: Sequence[ForecastProblem]
    flow: FlowFiles | None = None

    def nfe(self) -> int:
        """Upper estimate of the next-token distributions the whole run computes."""
        per_problem = sum(method.nfe(self.config.horizon) for method in self.methods)
        return per_problem * len(self.problems)


def load_config(path: str | None, overrides: dict[str, Any]) -> EvaluationConfig:
    """Configuration from a YAML file (None: defaults) with overrides, its ablation expanded.

    ConfigurationError names the bad field.
    """
    values = {} if path is None else read_mapping(Path(path), "config")
    return expanded(parse_options(EvaluationConfig, values | overrides, "an evaluation"))


def resolve(config: EvaluationConfig, flow: FlowFiles | None = None) -> Plan:
    """The plan of a configuration without its problems: all that can be refused without data or a model is.

    flow: the files of the configuration's flow, where they were read before. Errors as in `checks`.
    """
    # 1. The methods: options, flow use and sharing; evidence, labels and places in the ablation.
    checks.check_methods(config)
    checks.check_evidence(config)
    checks.check_labels(config)
    check_points(config)
    # 2. What they run on: data, flow and model.
    check_dataset(config.dataset)
    flow = checks.check_flow(config, flow)
    check_spec(config.model)
    # 3. What they search for.
    rewards = checks.check_rewards(config)
    checks.check_lengths(config)
    # 4. The identity of the flow becomes part of what makes two runs the same.
    if flow is not None:
        config = config.model_copy(update={"flow_identity": flow.identity})
    return Plan(config, _planned_methods(config, rewards), (), flow)


def make_plan(config: EvaluationConfig) -> Plan:
    """The whole plan of a configuration: `resolve`, then `with_problems`."""
    return with_problems(resolve(config))


def with_problems(plan: Plan) -> Plan:
    """The plan with its data loaded and cut into problems, and the methods' rewards tried on them.

    Raises DataError, ContextError, ConfigurationError or, when a reward works on no problem, RewardError.
    """
    problems = cut_problems(plan.config)
    rewards = {method.reward.spec: method.reward for method in plan.methods}
    for reward in rewards.values():
        try_rewards(reward, problems, plan.config.horizon)
    return replace(plan, problems=problems)


def plan_on(config: EvaluationConfig, problems: Sequence[ForecastProblem]) -> Plan:
    """The plan of a configuration that was checked before, on problems at hand, for searchers that hold its flow."""
    specs = dict.fromkeys(map(config.reward_of, config.method_configs()))
    rewards = {spec: parse_reward(spec) for spec in specs}
    return Plan(config, _planned_methods(config, rewards), problems)


def _planned_methods(
    config: EvaluationConfig, rewards: Mapping[str, RewardFactory]
) -> tuple[PlannedMethod, ...]:
    return tuple(
        _planned(config, method, rewards[config.reward_of(method)])
        for method in config.method_configs()
    )


def _planned(
    config: EvaluationConfig, method: MethodConfig, reward: RewardFactory
) -> PlannedMethod:
    return PlannedMethod(
        label=method.label,
        name=method.name,
        options=options_of(config, method),
        reward=reward,
        flow=config.flow_identity if method.uses_flow else None,
        is_reference=get_method(method.name).reference,
        has_walks=method.name in SHARING_METHODS,
    )


def cut_problems(config: EvaluationConfig) -> list[ForecastProblem]:
    """The problems of a configuration; DataError or ContextError for data that cannot be used."""
    return load_problems(
        config.dataset,
        horizon=config.horizon,
        context_length=config.context_length,
        num_problems=config.num_problems,
        split=config.split,
        stride=config.stride,
        channels=config.channels,
    )


def try_rewards(factory: RewardFactory, problems: Sequence[ForecastProblem], horizon: int) -> None:
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


def try_reward(factory: RewardFactory, history: np.ndarray, horizon: int) -> Reward:
    """The reward of a history [L], after it scored the history's end as if that were a forecast [horizon].

    So a reward that can score no such forecast is refused before anything is searched, with its own SdtError.
    """
    factory.check_horizon(horizon)
    reward = factory.build(RewardContext(history=history))
    end = np.resize(history[-horizon:], horizon)
    reward.score([Decoded((), series=end.astype(np.float64))])
    return reward
