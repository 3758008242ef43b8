"""A training of a flow from start to end: rounds that bring trajectories, take steps and publish.

See docs/concepts/flow.md.

A round's contexts, searches and batches depend on the seed, the round and the last published version alone, and the number
of rounds that brought theirs is saved with the learner's state: killed at any instant, a training goes on as if it never was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from sdt_dist.errors import ConfigurationError, SdtError
from sdt_dist.extras import check_package
from sdt_dist.files import write_text
from sdt_dist.flow.checkpoint import FlowInfo
from sdt_dist.flow.flow import Flow
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.card import ModelCard, card_of
from sdt_dist.models.forecaster.process import ForecastStates
from sdt_dist.models.process import ModelProcess
from sdt_dist.rewards.spec import parse_reward
from sdt_dist.search.session import SearchProblem
from sdt_dist.training.flow.collect import Collected, collect
from sdt_dist.training.flow.config import TrainFlowConfig
from sdt_dist.training.flow.contexts import (
    ContextSource,
    DatasetContexts,
    PromptContexts,
    SyntheticContexts,
    reward_context,
)
from sdt_dist.training.flow.learner import Learner, check_directory
from sdt_dist.training.flow.progress import Brought
from sdt_dist.training.flow.rounds import Part, parts_of
from sdt_dist.training.flow.saved import saved_trajectories
from sdt_dist.training.flow.trajectories import Trajectory

CONFIG = "config.yaml"
_HELD_OUT_DRAWS = 64  # of each held-out context


@dataclass(frozen=True, slots=True)
class Harvest:
    """Trajectories that one version of the flow drew (None: drawn from p), and what they are for the record."""

    trajectories: list[Trajectory]
    version: int | None
    brought: Brought


class Source(Protocol):
    """Where trajectories come from; `description` says it in a model card."""

    @property
    def description(self) -> str: ...

    def gather(self, round_number: int, flow: Flow | None) -> Iterator[Harvest]:
        """What a round brings; `flow` is the last published one."""
        ...

    def held_out(self) -> list[Trajectory]:
        """Draws from p of contexts that no round has."""
        ...


class Watch:
    """Told what a training does; the command line draws a bar from it."""

    def searching(self, round_number: int) -> None:
        """A round gathers its trajectories."""

    def step(self, step: int) -> None:
        """A gradient step was taken."""


class SavedTrees:
    """All trajectories of saved searches, in the first round."""

    def __init__(self, config: TrainFlowConfig, process: ModelProcess) -> None:
        assert config.trees is not None
        self._config = config
        self._process = process
        self._directories = [Path(tree) for tree in config.trees]

    @property
    def description(self) -> str:
        return f"saved searches of {', '.join(map(str, self._directories))}"

    def gather(self, round_number: int, flow: Flow | None) -> Iterator[Harvest]:
        if round_number:
            return
        config = self._config
        for found in saved_trajectories(
            self._directories,
            self._process,
            config.num_children,
            config.seed,
            ordered=is_ordered(self._process),
        ):
            yield Harvest(found, None, Brought(len(found)))

    def held_out(self) -> list[Trajectory]:
        return []


class LiveSearches:
    """Searches of fresh contexts in this process: without a flow and, once there is one, a share with the newest."""

    def __init__(
        self,
        config: TrainFlowConfig,
        process: ModelProcess,
        contexts: ContextSource,
        problem_of: Callable[[int, Any], SearchProblem],
    ) -> None:
        self._config = config
        self._process = process
        self._contexts = contexts
        self._problem_of = problem_of

    @property
    def description(self) -> str:
        return self._contexts.description

    def gather(self, round_number: int, flow: Flow | None) -> Iterator[Harvest]:
        config = self._config
        contexts = self._contexts.draw(config.seed, round_number, config.contexts_per_round)
        errors: list[SdtError] = []
        done = 0
        for part in parts_of(config, round_number, has_flow=flow is not None):
            found = self._search(part, contexts, flow if part.with_flow else None)
            errors += found.errors
            done += len(found.rewards)
            version = flow.info.version if part.with_flow and flow is not None else None
            yield Harvest(found.trajectories, version, found.brought(part.method))
        if flow is not None:
            flow.forget()
        if not done:
            raise (
                errors[0]
                if errors
                else ConfigurationError(f"round {round_number}: there was no context to search.")
            )

    def held_out(self) -> list[Trajectory]:
        config = self._config
        if not config.held_out_contexts:
            return []
        number = config.rounds + config.rounds_ahead  # no round has this one
        options = {
            "inverse_temperature": config.highest_inverse_temperature,
            "num_rollouts": _HELD_OUT_DRAWS,
        }
        contexts = self._contexts.draw(config.seed, number, config.held_out_contexts)
        first = 2 * number * config.contexts_per_round
        return self._search(Part(False, first, "snis", options), contexts, None).trajectories

    def _search(self, part: Part, contexts: list[Any], flow: Flow | None) -> Collected:
        config = self._config
        problems = []
        errors = []
        for index, context in enumerate(contexts, part.first):
            try:
                problems.append(self._problem_of(index, context))
            except SdtError as error:
                errors.append(error)
        found = collect(
            self._process, problems, part.method, part.options,
            seed=config.seed, flow=flow, num_children=config.num_children, ordered=is_ordered(self._process),
        )  # fmt: skip
        found.errors.extend(errors)
        return found


def train_flow(
    config: TrainFlowConfig,
    output: Path,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    load: Callable[..., Any] | None = None,
) -> Learner:
    """Train a flow, or go on with one, to the last round; `output` is then a flow that `Flow.load` takes.

    Returns the learner, closed. load: replaces `load_model`. Raises SdtError; what can be refused is refused before any work.
    """
    import torch

    from sdt_dist.models.loading import load_model

    check_package("tensorboard", "tune", "training a flow")
    check_directory(output, config.identity(), resume=resume)
    torch.set_num_threads(config.threads)
    loaded = (load or load_model)(
        config.model, device=None if config.device == "cpu" else config.device
    )
    process = loaded.process(config.horizon)
    card = card_of(loaded, config.model)
    source = _source(config, process)
    learner = open_learner(config, card, output, resume=resume)
    try:
        run_rounds(learner, source, config, watch or Watch())
        finish(learner, config, source.description)
    finally:
        learner.close()
    return learner


def open_learner(
    config: TrainFlowConfig, card: ModelCard, output: Path, *, resume: bool
) -> Learner:
    """The learner of a training of the model with this card, whose settings are then in the directory too."""
    spec = FlowSpec.of_card(card, config.horizon, **config.sizes())
    info = FlowInfo(card.identity, config.reward, config.training().inverse_temperatures)
    learner = Learner.open(
        output, spec, info, config.training(), config.learner(),
        configuration=config.identity(), resume=resume, device=config.device,
    )  # fmt: skip
    write_text(output / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return learner


def finish(learner: Learner, config: TrainFlowConfig, data: str) -> None:
    """Make the learner's directory a flow, with curves and card. data: what it was trained on."""
    from sdt_dist.training.flow.record import write_record

    learner.export(learner.directory)
    write_record(learner, config, data)


def run_rounds(learner: Learner, source: Source, config: TrainFlowConfig, watch: Watch) -> None:
    """Go on from wherever the learner's state is to the last version; version k + 1 has seen rounds 0 to k + rounds_ahead."""
    rounds = learner.progress.rounds
    unseen = source.held_out() if learner.version < config.rounds else []
    while learner.version < config.rounds:
        while len(rounds) <= learner.version + config.rounds_ahead:
            watch.searching(len(rounds))
            rounds.append(_gather(learner, source, len(rounds)))
            learner.save()
        target = config.steps_per_round * (learner.version + 1)
        learner.train(target - learner.step, on_step=lambda step, _: watch.step(step))
        if unseen:
            learner.progress.held_out.append(learner.divergences(unseen))
        learner.publish()


def _gather(learner: Learner, source: Source, round_number: int) -> list[Brought]:
    """Let the learner have a round's trajectories; what they were."""
    found = []
    for harvest in source.gather(round_number, learner.flow()):
        new = learner.add(harvest.trajectories, harvest.version)
        found.append(replace(harvest.brought, new=new))
    return found


def is_ordered(process: ModelProcess) -> bool:
    """Whether tokens are values, neighbours next to each other."""
    return isinstance(process.states, ForecastStates)


def _source(config: TrainFlowConfig, process: ModelProcess) -> Source:
    """What the configuration names, tried as far as that goes without searching."""
    if config.trees is not None:
        return SavedTrees(config, process)
    if config.flow_share > 0 and not hasattr(process.model, "load_flow"):
        raise ConfigurationError(
            f"model: {config.model!r} cannot hold flow networks in this process; use hf or mlx, or flow_share 0."
        )
    factory = parse_reward(config.reward)

    def problem_of(index: int, context: Any) -> SearchProblem:
        return SearchProblem(index, process.root(context), factory.build(reward_context(context)))

    states = process.states
    length = states.spec.context_length if isinstance(states, ForecastStates) else None
    return LiveSearches(config, process, contexts_of(config, length), problem_of)


def contexts_of(config: TrainFlowConfig, length: int | None) -> ContextSource:
    """The contexts that the configuration names; length: that of a forecaster's, None for a language model."""
    if config.prompts is not None:
        return PromptContexts(Path(config.prompts))
    assert length is not None, "contexts without prompts are a forecaster's"
    if config.dataset is not None:
        return DatasetContexts(config.dataset, length, config.end_row)
    return SyntheticContexts(length)
