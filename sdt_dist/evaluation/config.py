"""What an evaluation run is: strict configuration, its defaults the job of `make evaluate` (SPEC sections 8 and 10)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.search.methods import get_method, method_names, validate_options
from sdt_dist.search.options import TreeOptions, parse_options

if TYPE_CHECKING:
    from sdt_dist.flow.files import FlowFiles

EXECUTION_FIELDS = ("problems_in_flight", "flow")  # flow_identity says which flow, wherever it lies
_WITH_FLOW = "+flow"
_BUDGET_SHARE = 0.95  # tree rollouts start below the root, so this keeps their number within num_rollouts


class MethodConfig(BaseModel):
    """One column of the comparison: a method, its label, and options that differ from the shared ones.

    flow: whether it proposes with the evaluation's flow; default: where the method needs one. As a string, `snis+flow` is
    snis with it, under that label. reward: REWARD SPEC of its own; default the evaluation's. ablated: its place in the
    evaluation's ablation, filled in (`ablation.expanded`).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: str
    label: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    flow: bool | None = None
    reward: str | None = None
    ablated: dict[str, int | float] = Field(default_factory=dict)

    @classmethod
    def named(cls, text: str) -> MethodConfig:
        """The method of a string: its name, with or without `+flow`."""
        name = text.removesuffix(_WITH_FLOW)
        return cls(name=name, label=text, flow=True if name != text else None)

    @property
    def uses_flow(self) -> bool:
        """Whether its searches propose with a flow."""
        return get_method(self.name).flow == "required" if self.flow is None else self.flow

    def check_flow(self, is_given: bool) -> None:
        """ConfigurationError for a flow that the method cannot use, or for the lack of one that it is to use."""
        chosen = get_method(self.name)
        if self.uses_flow and chosen.flow == "none":
            chosen.check_flow(is_given=True)
        if not self.uses_flow and chosen.flow == "required":
            raise ConfigurationError(
                f"methods: {self.label} has flow: false, but {self.name} needs one; leave flow out, or use residual_ts."
            )
        if self.uses_flow and not is_given:
            raise ConfigurationError(f"methods: {self.label} needs a flow; give --flow PATH or leave it out.")


class EvaluationConfig(BaseModel):
    """An evaluation of several methods on the same problems, prior, reward and matched budget."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    dataset: str = Field("classic", description="dataset name, or path of a CSV")
    channels: list[str] | None = Field(None, description="channels to use; default all")
    split: Literal["train", "val", "test"] = Field("test", description="part whose rows are targets")
    num_problems: int | None = Field(12, ge=1, description="problems, evenly chosen; null for all")
    horizon: int = Field(24, ge=1, description="values to forecast")
    context_length: int = Field(512, ge=16, description="values of history")
    stride: int | None = Field(None, ge=1, description="rows between targets; default the horizon")
    model: str = Field("bundled", description="MODEL SPEC")
    reward: str = Field("spectral:gamma=1", description="REWARD SPEC")
    methods: list[str | MethodConfig] = Field(default_factory=lambda: list(method_names()), min_length=1)
    ablate: dict[str, list[int | float]] = Field(default_factory=dict, description="values of parameters to sweep")
    inverse_temperature: float = Field(3.0, gt=0, description="lambda of p(x) exp(lambda r(x))")
    num_rollouts: int = Field(100, ge=1, description="budget: every method gets the nfe of about so many rollouts")
    num_samples: int = Field(50, ge=2, description="samples a method returns")
    wave_size: int = Field(10, ge=1, description="leaves a tree evaluates per model call")
    seed: int = Field(0, ge=0, description="seed of every random draw")
    flow: str | None = Field(None, description="flow checkpoint, or bundled, for s_adt and methods with flow: true")
    flow_identity: str | None = Field(None, description="which flow that is; filled in, and no other is taken")
    searchers_per_problem: int = Field(1, ge=1, description="searches that share one problem's budget and evidence")
    warm_start: str | None = Field(None, description="output directory of an earlier run that kept its evidence")
    keep_evidence: bool = Field(False, description="keep every walk, for warm starts and re-weighting")
    problems_in_flight: int = Field(16, ge=1, description="problems searched together; does not change results")

    @field_validator("inverse_temperature", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        return float(value) if type(value) is int else value

    def method_configs(self) -> list[MethodConfig]:
        """The methods with their labels filled in."""
        full = [m if isinstance(m, MethodConfig) else MethodConfig.named(m) for m in self.methods]
        return [m if m.label else m.model_copy(update={"label": m.name}) for m in full]

    def options_of(self, method: MethodConfig) -> dict[str, Any]:
        """Options of one method: the shared settings, a matched nfe budget, then its own."""
        chosen = get_method(method.name)
        options: dict[str, Any] = {"inverse_temperature": self.inverse_temperature, "num_samples": self.num_samples}
        if not chosen.reference:
            options |= self.budget_of(self.num_rollouts)
        if issubclass(chosen.options, TreeOptions):
            options["wave_size"] = self.wave_size
        return options | method.options

    def budget_of(self, num_rollouts: int | float) -> dict[str, Any]:
        """The options that bound a search by the nfe of about so many rollouts."""
        nfe = max(self.horizon, round(_BUDGET_SHARE * num_rollouts * self.horizon))
        return {"num_rollouts": num_rollouts, "max_nfe": nfe}

    def reward_of(self, method: MethodConfig) -> str:
        """REWARD SPEC of one method: its own, or the evaluation's."""
        return self.reward if method.reward is None else method.reward

    def check(self) -> None:
        """Everything that can be refused without loading a model or data."""
        from sdt_dist.data import check_dataset
        from sdt_dist.evaluation.ablation import check_points
        from sdt_dist.models.loading import check_spec
        from sdt_dist.search.sharing_plan import check_sharing

        for method in self.method_configs():
            options = validate_options(method.name, self.options_of(method))
            method.check_flow(self.flow is not None)
            check_sharing(method.name, options, self.searchers_per_problem, self.warm_start is not None)
        self._check_evidence()
        labels = [method.label for method in self.method_configs()]
        if len(set(labels)) < len(labels):
            raise ConfigurationError(f"methods: labels {labels} must differ; give each its own label.")
        check_points(self)
        check_dataset(self.dataset)
        self._check_flow()
        check_spec(self.model)
        for reward in dict.fromkeys([self.reward, *map(self.reward_of, self.method_configs())]):
            self._check_reward(reward)
        if self.context_length < self.horizon:
            raise ConfigurationError(
                f"context_length: {self.context_length}, must be >= the horizon of {self.horizon}, because spectra compare "
                "a forecast with as long a piece of its history."
            )

    def _check_reward(self, spec: str) -> None:
        from sdt_dist.rewards.spec import parse_reward

        reward = parse_reward(spec)
        if not reward.scores_forecasts:
            raise ConfigurationError(f"reward: {spec!r} scores text; an evaluation of forecasts needs series.")
        reward.check_horizon(self.horizon)

    def _check_flow(self) -> None:
        """Everything of a flow but whether it was trained for the model, which is not loaded here."""
        from sdt_dist.models.loading import check_flow_backend

        if self.flow is None:
            if self.flow_identity is not None:
                raise ConfigurationError("flow_identity: given, but no flow; give --flow PATH, or leave it out.")
            return
        users = [method for method in self.method_configs() if method.uses_flow]
        if not users:
            raise ConfigurationError(
                f"flow: {self.flow!r}, but none of the methods {', '.join(m.label for m in self.method_configs())} uses it; "
                "add s_adt, snis+flow or smc+flow to methods, or leave it out."
            )
        check_flow_backend(self.model)
        head = self.flow_files().head
        for method in users:
            head.check_use(self.reward_of(method), self.options_of(method)["inverse_temperature"], self.horizon)

    def flow_files(self) -> FlowFiles:
        """The checkpoint of the flow; CheckpointError where it is damaged, or another flow than `flow_identity`."""
        from sdt_dist.flow.files import FlowFiles

        assert self.flow is not None
        files = FlowFiles.read(self.flow)
        if self.flow_identity not in (None, files.identity):
            raise CheckpointError(
                f"flow: {self.flow} holds flow {files.identity}, flow_identity is {self.flow_identity}; give that flow, or "
                "leave flow_identity out."
            )
        return files

    def _check_evidence(self) -> None:
        from sdt_dist.evaluation.evidence import evidence_files
        from sdt_dist.search.sharing_plan import SHARING_METHODS

        names = {method.name for method in self.method_configs()}
        if self.keep_evidence and not names.intersection(SHARING_METHODS):
            raise ConfigurationError(
                f"keep_evidence: true, but the methods {sorted(names)} have none to keep; allowed with: "
                f"{', '.join(SHARING_METHODS)}."
            )
        if self.warm_start is not None:
            evidence_files(self.warm_start)

    @property
    def shares_evidence(self) -> bool:
        """Whether searches read other searches' evidence, so that they need a store."""
        return self.searchers_per_problem > 1 or self.warm_start is not None

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same: everything but how they are executed."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in EXECUTION_FIELDS}


def load_config(path: str | None, overrides: dict[str, Any]) -> EvaluationConfig:
    """Configuration from a YAML file (None: defaults) with overrides, its ablation expanded.

    ConfigurationError names the bad field.
    """
    from sdt_dist.evaluation.ablation import expanded

    values: Any = {}
    if path is not None:
        values = read_mapping(Path(path), "config")
    config = expanded(parse_options(EvaluationConfig, values | overrides, "an evaluation"))
    config.check()
    return config if config.flow is None else config.model_copy(update={"flow_identity": config.flow_files().identity})


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """The mapping of settings in a YAML file, its values unchecked; ConfigurationError names `kind` and the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{kind}: {path} cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{kind}: {path} is not YAML in UTF-8 ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{kind}: {path} holds {type(values).__name__}, allowed: a mapping of settings.")
    odd = [name for name in values if not isinstance(name, str)]
    if odd:
        raise ConfigurationError(f"{kind}: {path} has the setting {odd[0]!r}, allowed: names of settings.")
    return values
