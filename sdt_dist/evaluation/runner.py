"""The evaluation run: the same problems, prior, reward and matched budget for every method; resumable (SPEC section 8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdt_dist.data.problems import ForecastProblem, load_problems
from sdt_dist.errors import SdtError
from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.evaluation.results import Line, ResultLog, open_directory, result_line, save_tree
from sdt_dist.evaluation.summary import Summary, recompute
from sdt_dist.protocols import Decoded, Process
from sdt_dist.rewards.base import Reward
from sdt_dist.rewards.spec import RewardContext, RewardFactory, parse_reward
from sdt_dist.search.api import run_searches
from sdt_dist.search.methods import get_method
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem


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
    """Load the data (no model), cut the problems and try the reward on them.

    Raises DataError, ContextError, ConfigurationError or, when no problem's reward works, RewardError.
    """
    problems = load_problems(
        config.dataset,
        horizon=config.horizon,
        context_length=config.context_length,
        num_problems=config.num_problems,
        split=config.split,
        stride=config.stride,
        channels=config.channels,
    )
    _try_rewards(parse_reward(config.reward), problems, config.horizon)
    return Plan(config, problems)


def try_reward(factory: RewardFactory, history: np.ndarray, horizon: int) -> Reward:
    """The reward of a history [L], after it scored the history's end as if that were a forecast [horizon].

    So a reward that can score no such forecast is refused before anything is searched, with its own SdtError.
    """
    factory.check_horizon(horizon)
    reward = factory.build(RewardContext(history=history))
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


class Progress:
    """Told of every finished problem; the command line draws a bar from it."""

    def start(self, total: int) -> None:
        """`total` problem-method pairs will be searched."""

    def done(self, line: Line) -> None:
        """One pair is on disk."""


def run_evaluation(
    plan: Plan,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    load: Callable[[str], object] | None = None,
) -> Summary:
    """Search every problem with every method, then summarise. Killed at any instant, it goes on with `resume`.

    Raises ResultsError for an unusable directory. A problem whose reward or context fails is recorded as failed and
    the others go on.
    """
    progress = progress or Progress()
    config = plan.config
    log = open_directory(output, config, plan.problems, resume=resume)
    done = log.done()
    todo = {
        method.label: [p for p in plan.problems if (p.index, method.label) not in done]
        for method in config.method_configs()
    }
    progress.start(sum(len(problems) for problems in todo.values()))
    if any(todo.values()):
        process = _load(config, load)
        for method in config.method_configs():
            _run_method(config, method, todo[method.label], process, log, progress)
    return recompute(output)


def _load(config: EvaluationConfig, load: Callable[[str], object] | None) -> Process:
    from sdt_dist.models.loading import load_model

    return (load or load_model)(config.model).process(config.horizon)  # type: ignore[union-attr]


def _run_method(
    config: EvaluationConfig,
    method: MethodConfig,
    problems: list[ForecastProblem],
    process: Process,
    log: ResultLog,
    progress: Progress,
) -> None:
    by_index = {problem.index: problem for problem in problems}
    factory = parse_reward(config.reward)
    searches = []

    def record(index: int, outcome: object) -> None:
        if index == 0 and isinstance(outcome, SearchResult) and outcome.snapshot is not None:
            save_tree(log.path.parent, method.label, outcome.snapshot)
        line = result_line(by_index[index], method.name, method.label, config.seed, outcome)  # type: ignore[arg-type]
        log.append(line)
        progress.done(line)

    for problem in problems:
        try:
            reward = factory.build(RewardContext(history=problem.history))
            searches.append(SearchProblem(problem.index, process.root(problem.history), reward))
        except SdtError as error:
            record(problem.index, error)
    runs = run_searches(
        process,
        searches,
        method=method.name,
        options=config.options_of(method),
        seed=config.seed,
        in_flight=config.problems_in_flight,
    )
    for index, outcome in runs:
        record(index, outcome)
