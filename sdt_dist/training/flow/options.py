"""Options of the flow's training, checked before anything starts (docs/concepts/flow.md)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sdt_dist.search.options import StrictOptions, parse_options


class LossOptions(StrictOptions):
    """What a flow learns by. Loss weights multiply means over trajectories in squared nats; 0 leaves a loss out.

    `log_partition_variance` needs per_context >= 2. `bellman` with `terminal` pins absolute values, as `subtb` does with
    `tie`; the trajectory losses alone leave the children of each parent free by a constant. `contrastive` and `path` are
    likelihoods, in nats; `path` trains the trunk of a network whose tokens have values, which cannot do without it.
    """

    learning_rate: float = Field(3e-3, gt=0, description="AdamW's, after warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="after warm-up; constant for endless streams"
    )
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a gradient")
    num_contexts: int = Field(8, ge=1, description="contexts in a batch")
    per_context: int = Field(4, ge=1, description="trajectories of each context in a batch")
    lowest_inverse_temperature: float = Field(
        1.0, gt=0, description="lambdas are drawn log-uniformly from here"
    )
    highest_inverse_temperature: float = Field(
        1.0, gt=0, description="to here, one per context and batch"
    )
    rtb: float = Field(1.0, ge=0, description="weight of relative trajectory balance")
    subtb: float = Field(0.0, ge=0, description="weight of SubTB")
    subtb_lambda: float = Field(
        0.9, gt=0, le=1, description="SubTB's weight per step of a subtrajectory"
    )
    log_partition_variance: float = Field(
        0.0, ge=0, description="weight of the log-partition variance"
    )
    bellman: float = Field(1.0, ge=0, description="weight of the soft Bellman equation")
    terminal: float = Field(1.0, ge=0, description="weight of F(finished) = r")
    tie: float = Field(1.0, ge=0, description="weight of F_token(s.a) = F_state(s.a)")
    contrastive: float = Field(
        0.0, ge=0, description="weight of likelihood on draws, weighted by p/q exp(lambda r)"
    )
    path: float = Field(
        1.0,
        ge=0,
        description="weight of predicting what spectra become under p, for tokens with values",
    )
    path_steps: int = Field(
        0,
        ge=0,
        description="first steps, by `path` alone, each on trajectories of as many contexts; for tokens with values",
    )
    log_every: int = Field(20, ge=1, description="steps between TensorBoard points")
    seed: int = Field(0, ge=0, description="of batches and inverse temperatures")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.lowest_inverse_temperature > self.highest_inverse_temperature:
            raise ValueError(
                "lowest_inverse_temperature must not exceed highest_inverse_temperature"
            )
        if self.per_context < 2 and (self.log_partition_variance > 0 or self.contrastive > 0):
            raise ValueError("log_partition_variance and contrastive need per_context >= 2")
        if not any(weight for name, weight in self.loss_weights.items() if name != "path"):
            raise ValueError("all loss weights are 0, so there is nothing to learn")
        return self

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss by name."""
        names = (
            "rtb",
            "subtb",
            "log_partition_variance",
            "bellman",
            "terminal",
            "tie",
            "contrastive",
            "path",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def inverse_temperatures(self) -> tuple[float, float]:
        """The range that the flow is trained for."""
        return self.lowest_inverse_temperature, self.highest_inverse_temperature


class FlowTrainOptions(LossOptions):
    """How a flow is trained: what it learns by, for how many steps."""

    steps: int = Field(2000, ge=1, description="gradient steps")

    @model_validator(mode="after")
    def _path_first(self) -> Self:
        if self.path_steps >= self.steps:
            raise ValueError(
                f"path_steps must be below the {self.steps} steps of the training, after which F would not begin"
            )
        return self

    @classmethod
    def parse(cls, values: dict[str, Any]) -> FlowTrainOptions:
        """Validated options; ConfigurationError names each bad field, its value and what is allowed."""
        return parse_options(cls, values, "flow training")


class LearnerOptions(StrictOptions):
    """How a learner keeps what it is given, and what it writes.

    A trajectory's age is how many versions of the flow were published since the one that drew it; draws from p alone have
    no age, because they are as good for every version.
    """

    replay_capacity: int = Field(
        4000, ge=1, description="most trajectories kept; the oldest go first"
    )
    priority_exponent: float = Field(
        0.5, ge=0, description="of the last loss, in drawing trajectories; 0: uniform"
    )
    max_staleness: int = Field(16, ge=0, description="oldest age, in versions, that is trained on")
    keep_versions: int = Field(3, ge=1, description="published versions that stay on disk")
    save_every: int = Field(
        200, ge=1, description="steps between saved states; publishing saves too"
    )
    calibrate_every: int = Field(
        100, ge=1, description="steps between comparisons of F with the trees' soft values"
    )
