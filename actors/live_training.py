"""A flow's training on a fleet: searches go on while a learner takes its steps, and end with the last of them.

See docs/concepts/flow.md.

Contexts, methods and numbers are those of the training in one process; when a version of the flow meets a search is up to
timing, so the same seed does not give the same flow again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.fleet import Watch, run_fleet
from sdt_dist.actors.learner import LearningPlan
from sdt_dist.actors.work import LATEST, Loader, RewardRecipe, SpecReward, Work, load_spec
from sdt_dist.errors import ConfigurationError, SdtError
from sdt_dist.extras import check_package
from sdt_dist.models.forecaster.spec import ForecasterSpec, forecaster_directory
from sdt_dist.models.loading import check_flow_backend, split_spec
from sdt_dist.search.result import SearchResult
from sdt_dist.training.flow.config import TrainFlowConfig
from sdt_dist.training.flow.contexts import ContextSource
from sdt_dist.training.flow.learner import STATE_FILE, check_directory
from sdt_dist.training.flow.progress import Progress
from sdt_dist.training.flow.rounds import parts_of
from sdt_dist.training.flow.train import contexts_of
from sdt_dist.training.flow.trainer import read_notes


@dataclass(frozen=True, slots=True)
class Trained:
    """Where a training ended."""

    version: int
    step: int
    metrics: dict[str, float]


class SearchStream:
    """Searches of fresh contexts without end, round after round, `ahead` of them queued or under way to keep a fleet busy.

    None begin while the trajectory buffer is full of what the learner has not taken, as they would be searched for nothing.

    The first of them draw from p, because there is no flow; once all model servers hold one, each context has a part of its
    rollouts with the newest, as in `LiveSearches`.
    """

    def __init__(
        self,
        config: TrainFlowConfig,
        contexts: ContextSource,
        reward_of: Callable[[Any], RewardRecipe],
        fleet: FleetConfig,
        first_round: int = 0,
    ) -> None:
        self._config = config
        self._contexts = contexts
        self._reward_of = reward_of
        self._ahead = fleet.searchers * fleet.problems_per_searcher + config.contexts_per_round
        self._most_waiting = fleet.buffer_records
        self._round = first_round
        self._failures = 0

    def more(self, status: dict[str, Any]) -> list[Work] | None:
        """Searches to add to a fleet in this state; None when its learner has finished."""
        if status["slots"]["learner-0"].get("finished"):
            return None
        work: list[Work] = []
        if status["slots"]["trajectory-buffer-0"].get("waiting", 0) >= self._most_waiting:
            return work
        while status["waiting"] + status["under_way"] + len(work) < self._ahead:
            work += self._next_round(has_flow=status["flow_version"] > 0)
        return work

    def note(self, outcome: SearchResult | SdtError) -> None:
        """Look at an outcome; the error itself is raised when as many as two rounds have failed in a row."""
        self._failures = self._failures + 1 if isinstance(outcome, SdtError) else 0
        if isinstance(outcome, SdtError) and self._failures >= 2 * self._config.contexts_per_round:
            raise outcome

    def _next_round(self, *, has_flow: bool) -> list[Work]:
        config = self._config
        number = self._round
        self._round += 1
        contexts = self._contexts.draw(config.seed, number, config.contexts_per_round)
        if not contexts:
            raise ConfigurationError(f"round {number}: there was no context to search.")
        return [
            Work(
                name=f"{part.method}/{index}",
                problem=index,
                context=context,
                reward=self._reward_of(context),
                method=part.method,
                options=part.options,
                seed=config.seed,
                flow=LATEST if part.with_flow else None,
                for_learning=True,
            )
            for part in parts_of(config, number, has_flow=has_flow)
            for index, context in enumerate(contexts, part.first)
        ]


def train_live(
    config: TrainFlowConfig,
    output: Path,
    fleet: FleetConfig,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    loader: Loader | None = None,
    contexts: ContextSource | None = None,
    reward_of: Callable[[Any], RewardRecipe] | None = None,
) -> Trained:
    """Train a flow on the fleet of the Ray instance that is connected, or go on with one, to the last step.

    `output` is then a flow with its curves and card, on this machine. loader, contexts, reward_of: replace the model, the
    contexts and the reward that the configuration names. Raises SdtError.
    """
    next_round = check_live(config, output, fleet, resume=resume)
    contexts = contexts or contexts_of(config, context_length(config.model))
    recipe = SpecReward.of(config.reward)
    stream = SearchStream(config, contexts, reward_of or (lambda _: recipe), fleet, next_round)
    last: dict[str, Any] = {}

    def feed(status: dict[str, Any]) -> list[Work] | None:
        last.update(status["slots"]["learner-0"])
        return stream.more(status)

    runs = run_fleet(
        [],
        fleet,
        loader or partial(load_spec, config.model),
        max_new_tokens=config.horizon,
        watch=watch,
        feed=feed,
        plan=LearningPlan(
            config, output.resolve(), f"{contexts.description}, searched by a fleet meanwhile"
        ),
    )
    with closing(runs):
        for _, outcome in runs:
            stream.note(outcome)
    return Trained(last["version"], last["step"], last["metrics"])


def check_live(config: TrainFlowConfig, output: Path, fleet: FleetConfig, *, resume: bool) -> int:
    """The round with which a training's searches begin: the next one of what the directory holds.

    What can be refused without Ray and without a model is refused: errors as for `check_directory`, and ConfigurationError.
    """
    check_package("tensorboard", "tune", "training a flow")
    if config.flow_share > 0:
        check_flow_backend(config.model)
        fleet.check_flows()
    if config.device.startswith("cuda") and not fleet.learner_gpus:
        raise ConfigurationError(
            f"device: {config.device!r}, but learner_gpus is 0; set it in the fleet's file."
        )
    if not check_directory(output, config.identity(), resume=resume):
        return 0
    state = output / STATE_FILE
    progress = Progress.of(read_notes(state)["facts"], str(state))
    return 0 if progress.intake is None else progress.intake.next_round


def context_length(model: str) -> int | None:
    """How many values a forecaster sees, without loading it; None for a language model."""
    directory = forecaster_directory(split_spec(model)[1])
    return None if directory is None else ForecasterSpec.load(directory).context_length
