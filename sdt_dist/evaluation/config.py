"""What a user asks of an evaluation: strict configuration, its defaults the job of `make evaluate`.

See docs/guides/evaluate.md. It says nothing of what that means for a search: `plan.py` does.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sdt_dist.search.methods import get_method, method_names
from sdt_dist.tasks.registry import get_task
from sdt_dist.tasks.task import Task

EXECUTION_FIELDS = ("problems_in_flight", "flow")  # flow_identity says which flow, wherever it lies
_WITH_FLOW = "+flow"


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


class EvaluationConfig(BaseModel):
    """An evaluation of several methods on the same problems, prior, reward and matched budget."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    dataset: str = Field("classic", description="dataset name, or path of a CSV")
    channels: list[str] | None = Field(None, description="channels to use; default all")
    split: Literal["train", "val", "test"] = Field(
        "test", description="part whose rows are targets"
    )
    num_problems: int | None = Field(12, ge=1, description="problems, evenly chosen; null for all")
    horizon: int = Field(24, ge=1, description="values to forecast")
    context_length: int = Field(512, ge=16, description="values of history")
    stride: int | None = Field(None, ge=1, description="rows between targets; default the horizon")
    model: str = Field("bundled", description="MODEL SPEC")
    reward: str = Field("spectral:gamma=1", description="REWARD SPEC")
    methods: list[str | MethodConfig] = Field(
        default_factory=lambda: list(method_names()), min_length=1
    )
    ablate: dict[str, list[int | float]] = Field(
        default_factory=dict, description="values of parameters to sweep"
    )
    inverse_temperature: float = Field(3.0, gt=0, description="lambda of p(x) exp(lambda r(x))")
    num_rollouts: int = Field(
        100, ge=1, description="budget: every method gets the nfe of about so many rollouts"
    )
    num_samples: int = Field(50, ge=2, description="samples a method returns")
    wave_size: int = Field(10, ge=1, description="leaves a tree evaluates per model call")
    seed: int = Field(0, ge=0, description="seed of every random draw")
    flow: str | None = Field(
        None, description="flow checkpoint, or bundled, for s_adt and methods with flow: true"
    )
    flow_identity: str | None = Field(
        None, description="which flow that is; filled in, and no other is taken"
    )
    searchers_per_problem: int = Field(
        1, ge=1, description="searches that share one problem's budget and evidence"
    )
    warm_start: str | None = Field(
        None, description="output directory of an earlier run that kept its evidence"
    )
    keep_evidence: bool = Field(
        False, description="keep every walk, for warm starts and re-weighting"
    )
    problems_in_flight: int = Field(
        16, ge=1, description="problems searched together; does not change results"
    )

    @field_validator("inverse_temperature", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        return float(value) if type(value) is int else value

    def method_configs(self) -> list[MethodConfig]:
        """The methods with their labels filled in."""
        return [_labelled(method) for method in self.methods]

    def reward_of(self, method: MethodConfig) -> str:
        """REWARD SPEC of one method: its own, or the evaluation's."""
        return self.reward if method.reward is None else method.reward

    @property
    def task(self) -> Task[Any]:
        """What kind of problem is searched."""
        return get_task("forecast")

    @property
    def shares_evidence(self) -> bool:
        """Whether searches read other searches' evidence, so that they need a store."""
        return self.searchers_per_problem > 1 or self.warm_start is not None

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same: everything but how they are executed."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in EXECUTION_FIELDS}


def _labelled(method: str | MethodConfig) -> MethodConfig:
    full = MethodConfig.named(method) if isinstance(method, str) else method
    return full if full.label else full.model_copy(update={"label": full.name})
