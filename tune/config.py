"""What a sweep is: strict configuration, and everything in it that can be refused before Ray starts.

See docs/guides/sweeps.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.data.scale import fit_scale
from sdt_dist.errors import ConfigurationError, SdtError
from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.evaluation.method_options import options_of
from sdt_dist.evaluation.plan import cut_problems, resolve, try_reward, try_rewards
from sdt_dist.files import read_mapping
from sdt_dist.flow.files import FlowFiles
from sdt_dist.rewards.spec import parse_reward, with_gamma
from sdt_dist.search.methods import get_method
from sdt_dist.search.options import parse_options
from sdt_dist.tune.objectives import OBJECTIVES, check_objectives
from sdt_dist.tune.space import BUDGETS, COMMON, Domain, Parameters, Space, check_form

_NOT_OF_A_TRIAL = {
    "methods": "give `methods` beside `evaluation`",
    "keep_evidence": "trials keep none; `sdt evaluate` does",
    "warm_start": "trials must not start from one another's evidence; use `screen`",
    "searchers_per_problem": "its results depend on timing",
}
TRIALS = "trials.jsonl"  # of a sweep's directory: a line a trial
PAGE = "sweep.html"  # and its report
EXECUTION_FIELDS = ("max_concurrent", "wandb")


class SweepConfig(BaseModel):
    """A sweep: the evaluation that every trial makes, and what differs between trials."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    evaluation: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of `sdt evaluate` that all trials share; split is val by default",
    )
    methods: list[str] = Field(default_factory=lambda: ["snis", "residual_ts"], min_length=1)
    space: dict[str, Domain] = Field(
        default_factory=dict,
        description="by parameter: choices, or {low, high, log}; a trial has those that its method has",
    )
    objectives: list[str] = Field(
        default_factory=lambda: ["crps"], min_length=1, description="one, or several (Pareto)"
    )
    rungs: list[int] | None = Field(
        None, min_length=1, description="growing budgets in rollouts, each searched afresh"
    )
    scheduler: Literal["asha", "none"] | None = Field(
        None,
        description="asha stops trials between rungs; default: asha for one objective and several rungs",
    )
    num_trials: int = Field(20, ge=1, description="configurations to try")
    max_concurrent: int = Field(
        4, ge=1, description="trials beside each other; they share the fleet"
    )
    seed: int = Field(
        0, ge=0, description="seed of the suggestions; searches have the evaluation's own"
    )
    screen: str | None = Field(
        None,
        description="directory of a run with keep_evidence, to rank lambda and gamma without a search",
    )
    wandb: str | None = Field(
        None, description="project to which Tune's own W&B callback logs; needs wandb"
    )

    @property
    def base(self) -> EvaluationConfig:
        """The settings that all trials share."""
        return parse_options(EvaluationConfig, {"split": "val"} | self.evaluation, "evaluation")

    @property
    def search_space(self) -> Space:
        return Space(tuple(self.methods), self.space)

    @property
    def asha(self) -> bool:
        """Whether trials are stopped between rungs."""
        if self.scheduler is None:
            return len(self.objectives) == 1 and self.rungs is not None and len(self.rungs) > 1
        return self.scheduler == "asha"

    def budgets(self, parameters: Parameters) -> list[int]:
        """The budgets of a trial in rollouts, one search of every problem each."""
        return self.rungs or [parameters.get("rollouts", self.base.num_rollouts)]

    def evaluation_of(
        self, parameters: Parameters, rollouts: int, split: str | None = None
    ) -> EvaluationConfig:
        """The evaluation of one trial at one budget; SdtError where its parameters do not go together."""
        base = self.base
        method = MethodConfig.named(parameters["method"])
        options = {k: v for k, v in parameters.items() if k not in (*COMMON, "method")}
        if "max_nfe" in options:
            options["num_rollouts"] = None
        chosen: dict[str, Any] = {"methods": [method.model_copy(update={"options": options})]}
        chosen["num_rollouts"] = rollouts
        if "inverse_temperature" in parameters:
            chosen["inverse_temperature"] = float(parameters["inverse_temperature"])
        if "gamma" in parameters:
            chosen["reward"] = with_gamma(base.reward, float(parameters["gamma"]))
        if not method.uses_flow:
            chosen |= {"flow": None, "flow_identity": None}
        return base.model_copy(update=chosen | ({} if split is None else {"split": split}))

    def check(self) -> FlowFiles | None:
        """Everything that can be refused without data, a model or Ray; returns the files of the flow, which that reads."""
        for name, advice in _NOT_OF_A_TRIAL.items():
            if name in self.evaluation:
                raise ConfigurationError(f"evaluation: {name} is no setting of a sweep: {advice}.")
        self._check_methods()
        self.search_space.check()
        if "gamma" in self.space:
            with_gamma(self.base.reward, 1.0)
        check_objectives(self.objectives, self.space)
        self._check_budgets()
        flow = self._check_corners()
        if self.wandb is not None:
            check_wandb()
        return flow

    def identity(self) -> dict[str, Any]:
        """What makes two sweeps the same: everything but how they are executed."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in EXECUTION_FIELDS}

    def _check_methods(self) -> None:
        if len(set(self.methods)) < len(self.methods):
            raise ConfigurationError(f"methods: {', '.join(self.methods)}, each may be given once.")
        lines = [
            name for name in self.methods if get_method(MethodConfig.named(name).name).reference
        ]
        if lines:
            raise ConfigurationError(
                f"methods: {lines[0]} is a reference line outside the budget; leave it out."
            )
        if self.base.flow is not None and not any(
            MethodConfig.named(name).uses_flow for name in self.methods
        ):
            raise ConfigurationError(
                f"evaluation: flow: {self.base.flow!r}, but none of the methods {', '.join(self.methods)} uses it; add s_adt, "
                "snis+flow or smc+flow to methods, or leave it out."
            )
        if len(self.methods) == 1 and not self.space:
            raise ConfigurationError(
                "space: empty, and there is one method; give parameters to try, or more methods."
            )

    def _check_budgets(self) -> None:
        swept = [name for name in BUDGETS if name in self.space]
        if len(swept) > 1:
            raise ConfigurationError(
                "space: rollouts and max_nfe are both budgets; sweep one of them."
            )
        if self.rungs is not None and swept:
            raise ConfigurationError(
                f"rungs: given, but {swept[0]} is swept; budgets grow or are swept, not both."
            )
        if self.rungs is not None and (self.rungs[0] < 1 or self.rungs != sorted(set(self.rungs))):
            raise ConfigurationError(
                f"rungs: {self.rungs}, allowed: whole numbers above 0 that rise."
            )
        if self.asha:
            self._check_asha()

    def _check_asha(self) -> None:
        if len(self.objectives) > 1:
            raise ConfigurationError(
                f"scheduler: asha, but there are {len(self.objectives)} objectives, and it stops trials by one; give "
                "scheduler: none, or one objective."
            )
        if self.rungs is None or len(self.rungs) < 2:
            raise ConfigurationError(
                "scheduler: asha needs rungs, at least two; give rungs such as [10, 30, 90]."
            )
        factor = self.rungs[1] // self.rungs[0]
        if factor < 2 or any(
            high != low * factor for low, high in zip(self.rungs, self.rungs[1:], strict=False)
        ):
            raise ConfigurationError(
                f"rungs: {self.rungs}, but asha needs each to be the same whole multiple of the one before, such as "
                "[10, 30, 90]; or give scheduler: none."
            )

    def _check_corners(self) -> FlowFiles | None:
        """Both ends of every range and every choice, as the methods themselves would refuse them; the flow's files."""
        space = self.search_space
        flow: FlowFiles | None = None
        for method in self.methods:
            for number, parameters in enumerate(space.corners(method)):
                try:
                    evaluation = self.evaluation_of(parameters, self.budgets(parameters)[-1])
                    checked = EvaluationConfig.model_validate(evaluation.model_dump())
                    if number == 0 or checked.flow is not None:
                        flow = resolve(checked, flow).flow or flow
                    _check_quickly(checked)
                except (SdtError, ValueError) as error:
                    given = ", ".join(f"{k}={v}" for k, v in parameters.items() if k != "method")
                    raise ConfigurationError(
                        f"space: {method} with {given}: {' '.join(str(error).split())}"
                    ) from error
        return flow


def _check_quickly(config: EvaluationConfig) -> None:
    from sdt_dist.search.methods import validate_options

    for method in config.method_configs():
        validate_options(method.name, options_of(config, method))
    parse_reward(config.reward)


def check_wandb() -> None:
    """MissingExtraError where W&B is asked for and absent."""
    import importlib.util

    from sdt_dist.errors import MissingExtraError

    if importlib.util.find_spec("wandb") is None:
        raise MissingExtraError(
            "wandb: given, but the package is not installed; pip install wandb, or leave it out."
        )


def load_sweep(path: str | Path | None, overrides: dict[str, Any]) -> SweepConfig:
    """The sweep in a YAML file (None: defaults) with overrides, checked; ConfigurationError names the bad field.

    `evaluation` of the overrides replaces single settings of the file's.
    """
    values = {} if path is None else read_mapping(Path(path), "sweep")
    evaluation = values.get("evaluation", {})
    if not isinstance(evaluation, dict):
        raise ConfigurationError(f"evaluation: {evaluation!r}, allowed: a mapping of settings.")
    space = overrides.get("space", values.get("space", {}))
    for name, domain in space.items() if isinstance(space, dict) else ():
        check_form(name, domain)
    merged = values | overrides | {"evaluation": evaluation | overrides.get("evaluation", {})}
    sweep = parse_options(SweepConfig, merged, "a sweep")
    flow = sweep.check()
    if flow is None:
        return sweep
    which = {"flow_identity": flow.identity}
    return sweep.model_copy(update={"evaluation": sweep.evaluation | which})


def problems_of(sweep: SweepConfig) -> list[ForecastProblem]:
    """The problems of every trial. SdtError for data that cannot be used, or a problem that no trial could search.

    A problem that fails in every trial would leave no trial to choose, so it is refused here.
    """
    base = sweep.base
    problems = cut_problems(base)
    factory = parse_reward(base.reward)
    try_rewards(factory, problems, base.horizon)
    for problem in problems:
        try:
            try_reward(factory, problem.history, base.horizon)
            fit_scale(problem.history)
        except SdtError as error:
            raise type(error)(f"problem {problem.name} cannot be searched: {error}") from error
    return problems


def quality(names: list[str]) -> str:
    """The first objective that is a quality, by which a sweep ranks."""
    return next(name for name in names if name in OBJECTIVES and name != "nfe")


def front_axes(names: list[str]) -> list[str]:
    """What a Pareto front is of: the objectives where there are several, else the quality and its cost."""
    return names if len(names) > 1 else [names[0], "nfe"]
