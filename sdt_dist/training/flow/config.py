"""What a training of a flow is: strict configuration, checked before a model loads.

See docs/concepts/flow.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from sdt_dist.errors import ConfigurationError, DataError
from sdt_dist.files import read_mapping
from sdt_dist.search.methods import get_method, validate_options
from sdt_dist.search.options import TreeOptions, parse_options
from sdt_dist.training.flow.options import FlowTrainOptions, LearnerOptions, LossOptions

EXECUTION_FIELDS = ("device", "threads")
_HORIZON = 24
_SCORED = {
    "series": "forecasts; give one that scores series",
    "text": "text; give one that scores text",
    "tokens": "text; give one that scores text",
}
_ONLY_LIVE = ("dataset", "end_row", "prompts")
_SIZES = ("hidden_size", "num_layers", "key_size", "context_length", "patch")


class TrainFlowConfig(LossOptions, LearnerOptions):
    """A training of a flow for one model and reward, in rounds: each brings trajectories, takes steps and publishes.

    With `trees` all trajectories come in the first round, out of saved searches; else every round searches fresh contexts:
    synthetic series unless a dataset or prompts are given. Loss weights are those that helped a forecaster's searches: squared
    losses let poor samples, which are many, rule a flow that learns off its policy.
    """

    model: str = Field("bundled", description="MODEL SPEC")
    reward: str = Field("spectral:gamma=1", description="REWARD SPEC")
    trees: list[str] | None = Field(
        None, min_length=1, description="output directories of `sdt evaluate`"
    )
    dataset: str | None = Field(
        None, description="dataset name or CSV: contexts are windows of its training part"
    )
    end_row: int | None = Field(
        None, ge=1, description="use rows of the dataset before this one only"
    )
    prompts: str | None = Field(
        None, description="text file, one prompt a line: contexts of a language model"
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="tokens of a sample; default: that of the trees, else 24"
    )
    rounds: int = Field(10, ge=1, description="rounds; each ends with a published version")
    rounds_ahead: int = Field(
        0,
        ge=0,
        description="further rounds searched before the first step, lest the first contexts be learnt by heart",
    )
    steps_per_round: int = Field(200, ge=1, description="gradient steps a round")
    contexts_per_round: int = Field(16, ge=1, description="contexts that a round searches")
    rollouts: int = Field(32, ge=1, description="rollouts a context")
    flow_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of them that draws from the newest flow, once there is one",
    )
    method: str = Field("residual_ts", description="method of the searches without a flow")
    method_options: dict[str, Any] = Field(default_factory=dict, description="its options")
    flow_method: str = Field(
        "s_adt", description="method of the searches with the newest flow: s_adt, snis or smc"
    )
    flow_method_options: dict[str, Any] = Field(default_factory=dict, description="its options")
    held_out_contexts: int = Field(
        0,
        ge=0,
        description="further synthetic contexts, never trained on, to tell after each round whether F helps",
    )
    live: bool = Field(
        False, description="learn while a fleet searches; not repeatable from the seed"
    )
    steps_per_trajectory: float | None = Field(
        None,
        gt=0,
        description="live: most gradient steps a finished sample that came in; default: as many as in rounds",
    )
    wave_size: int = Field(8, ge=1, description="leaves a tree evaluates per model call")
    num_children: int | None = Field(
        32,
        ge=2,
        description="candidates a step (values: strata of neighbours); null: complete rows",
    )
    contrastive: float = Field(
        1.0, ge=0, description="weight of likelihood on draws, weighted by p/q exp(lambda r)"
    )
    rtb: float = Field(0.0, ge=0, description="weight of relative trajectory balance")
    bellman: float = Field(1e-3, ge=0, description="weight of the soft Bellman equation")
    terminal: float = Field(1e-3, ge=0, description="weight of F(finished) = r")
    tie: float = Field(1e-3, ge=0, description="weight of F_token(s.a) = F_state(s.a)")
    lowest_inverse_temperature: float = Field(
        1.0, gt=0, description="lambdas are drawn log-uniformly from here"
    )
    highest_inverse_temperature: float = Field(
        8.0, gt=0, description="to here, one per context and batch"
    )
    hidden_size: int = Field(96, ge=1, le=4096, description="width of the network")
    num_layers: int = Field(1, ge=1, le=16, description="layers of its trunk")
    key_size: int = Field(
        32, ge=1, le=4096, description="width in which states and tokens are multiplied"
    )
    context_length: int = Field(512, ge=1, description="last tokens of a prompt that it reads")
    patch: int = Field(8, ge=1, le=1024, description="tokens per step of its context encoder")
    device: str = Field("cpu", description="cpu or cuda")
    threads: int = Field(
        1, ge=1, description="torch threads; only with one is a training repeatable to the bit"
    )

    @model_validator(mode="after")
    def _one_source(self) -> TrainFlowConfig:
        given = [name for name in _ONLY_LIVE if getattr(self, name) is not None]
        if self.trees is not None and given:
            raise ValueError(f"trees and {given[0]} exclude each other; leave one out")
        if self.trees is not None and self.live:
            raise ValueError("trees and live exclude each other; leave one out")
        if self.steps_per_trajectory is not None and not self.live:
            raise ValueError(
                "steps_per_trajectory is given without live; leave it out, or learn live"
            )
        if self.rounds_ahead and (self.live or self.trees is not None):
            raise ValueError(
                "rounds_ahead is for searches that training waits for; leave it out, or live and trees"
            )
        elsewhere = [
            n
            for n in ("trees", "dataset", "prompts", "live")
            if getattr(self, n) not in (None, False)
        ]
        if self.held_out_contexts and elsewhere:
            raise ValueError(
                f"held_out_contexts needs fresh synthetic contexts, and {elsewhere[0]} is given; leave one out"
            )
        if self.dataset is not None and self.prompts is not None:
            raise ValueError("dataset and prompts exclude each other; leave one out")
        if self.end_row is not None and self.dataset is None:
            raise ValueError("end_row is given without a dataset; give one")
        return self

    @property
    def horizon(self) -> int:
        """max_new_tokens, once `load_train_config` has settled it."""
        return _HORIZON if self.max_new_tokens is None else self.max_new_tokens

    @property
    def steps(self) -> int:
        """Gradient steps of the whole training."""
        return self.rounds * self.steps_per_round

    @property
    def step_ratio(self) -> float:
        """Most gradient steps a finished sample of a live training."""
        return self.steps_per_trajectory or self.steps_per_round / (
            self.contexts_per_round * self.rollouts
        )

    def training(self) -> FlowTrainOptions:
        """What the trainer is told; ConfigurationError where that contradicts itself."""
        own = {name: getattr(self, name) for name in LossOptions.model_fields}
        return FlowTrainOptions.parse({"steps": self.steps, **own})

    def learner(self) -> LearnerOptions:
        """What the learner is told."""
        return LearnerOptions(**{name: getattr(self, name) for name in LearnerOptions.model_fields})

    def sizes(self) -> dict[str, int]:
        """Sizes of the network."""
        return {name: getattr(self, name) for name in _SIZES}

    def identity(self) -> dict[str, Any]:
        """What makes two trainings the same: everything but how they are executed."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in EXECUTION_FIELDS}

    def search_options(
        self, *, with_flow: bool, rollouts: int, inverse_temperature: float
    ) -> dict[str, Any]:
        """Options of a round's searches: the shared ones, then the method's own."""
        name, own = (
            (self.flow_method, self.flow_method_options)
            if with_flow
            else (self.method, self.method_options)
        )
        options: dict[str, Any] = {
            "inverse_temperature": inverse_temperature,
            "num_rollouts": rollouts,
        }
        if issubclass(get_method(name).options, TreeOptions):
            options["wave_size"] = self.wave_size
        return options | own

    def check(self) -> None:
        """Everything that can be refused without loading a model; SdtError names the setting."""
        from sdt_dist.models.spec import check_spec, outlook_of
        from sdt_dist.rewards.spec import parse_reward

        self.training()
        check_spec(self.model)
        reward = parse_reward(self.reward)
        view = outlook_of(self.model).sample_view
        if not reward.scores(view):
            raise ConfigurationError(f"reward: {self.reward!r} cannot score {_SCORED[view]}.")
        reward.check_horizon(self.horizon)
        if self.trees is None:
            self._check_contexts(of_series=view == "series")
            self._check_methods()

    def _check_contexts(self, *, of_series: bool) -> None:
        from sdt_dist.data.registry import check_dataset

        if of_series and self.prompts is not None:
            raise ConfigurationError(
                f"prompts: {self.prompts!r}, but {self.model!r} is a forecaster; use dataset."
            )
        if not of_series and self.prompts is None:
            raise ConfigurationError(
                f"prompts: none, but {self.model!r} is a language model; give a file, one a line."
            )
        if self.dataset is not None:
            check_dataset(self.dataset)
        if self.prompts is not None and not Path(self.prompts).is_file():
            raise DataError(f"prompts: file {self.prompts!r} does not exist.")

    def _check_methods(self) -> None:
        low = self.lowest_inverse_temperature
        for name, with_flow in ((self.method, False), (self.flow_method, True)):
            if with_flow and self.flow_share == 0:
                continue
            if get_method(name).reference:
                raise ConfigurationError(
                    f"method: {name!r} has no budget of rollouts; use snis or residual_ts."
                )
            get_method(name).check_flow(with_flow)
            options = self.search_options(
                with_flow=with_flow, rollouts=self.rollouts, inverse_temperature=low
            )
            validate_options(name, options)


def load_train_config(path: str | None, overrides: dict[str, Any]) -> TrainFlowConfig:
    """Configuration from a YAML file (None: defaults) with overrides; SdtError names what is wrong, before a model loads."""
    from sdt_dist.training.flow.saved import check_saved

    values = {} if path is None else read_mapping(Path(path), "config")
    config = parse_options(TrainFlowConfig, values | overrides, "a training of a flow")
    horizon = None
    if config.trees is not None:
        horizon = check_saved([Path(tree) for tree in config.trees], config.model, config.reward)
        if config.max_new_tokens not in (None, horizon):
            raise ConfigurationError(
                f"max_new_tokens: {config.max_new_tokens}, but the trees are of {horizon} tokens; leave it out."
            )
    config = config.model_copy(update={"max_new_tokens": horizon or config.horizon})
    config.check()
    return config
