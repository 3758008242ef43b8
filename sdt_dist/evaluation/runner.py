"""The evaluation run: the same problems, prior, reward and matched budget for every method; resumable.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import SdtError
from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.evaluation.environment import note_environment, server_record
from sdt_dist.evaluation.evidence import Evidence
from sdt_dist.evaluation.plan import Plan
from sdt_dist.evaluation.results import Line, open_directory, result_line, save_tree
from sdt_dist.evaluation.summary import Summary, recompute
from sdt_dist.protocols import Flow, Process
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import parse_reward
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from sdt_dist.search.sharing_plan import SharingPlan


class Progress:
    """Told of every finished problem; the command line draws a bar from it."""

    def start(self, total: int) -> None:
        """`total` problem-method pairs will be searched."""

    def done(self, line: Line) -> None:
        """One pair is on disk."""


@dataclass(frozen=True, slots=True)
class Task:
    """One line of a run: a problem and the method that searches it, and how its searches share evidence (None: not)."""

    problem: ForecastProblem
    method: MethodConfig
    sharing: SharingPlan | None = None
    keeps_search: bool = False

    @property
    def key(self) -> tuple[int, str]:
        """What names the line in its run."""
        return self.problem.index, self.method.label


Outcome = SearchResult | SdtError
Execute = Callable[[EvaluationConfig, Sequence[Task]], Iterator[tuple[Task, Outcome]]]


def run_evaluation(
    plan: Plan,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    execute: Execute | None = None,
    servers: Sequence[dict[str, Any]] | None = None,
) -> Summary:
    """Search every problem with every method, then summarise. Killed at any instant, it goes on with `resume`.

    execute: makes the searches, in any order; default: this process does. servers: records of who answers for the model,
    for environment.json; default: this process. Raises ResultsError for an unusable directory.
    A problem whose reward or context fails is recorded as failed and the others go on.
    """
    answering = servers or [server_record(plan.config.model)]
    search_all(plan, output, resume=resume, progress=progress, execute=execute, servers=answering)
    return recompute(output)


def search_all(
    plan: Plan,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    execute: Execute | None = None,
    servers: Sequence[dict[str, Any]] = (),
) -> None:
    """`run_evaluation` without its summary, so that whoever only searches need not load the metrics.

    Without `servers` there is no environment.json.
    """
    progress = progress or Progress()
    config = plan.config
    log = open_directory(output, config, plan.problems, resume=resume)
    done = log.done()
    evidence = Evidence(config, plan.problems, output)
    todo = [
        Task(
            problem,
            method,
            evidence.sharing(method),
            problem.index == 0 or evidence.is_kept(method),
        )
        for method in config.method_configs()
        for problem in plan.problems
        if (problem.index, method.label) not in done
    ]
    progress.start(len(todo))
    if todo:
        if servers:
            note_environment(output, servers)
        for task, outcome in (execute or in_process())(config, todo):
            _keep(task, outcome, output, evidence)
            line = result_line(
                task.problem, task.method.name, task.method.label, config.seed, outcome
            )
            log.append(line)
            progress.done(line)


def _keep(task: Task, outcome: Outcome, output: Path, evidence: Evidence) -> None:
    """Put what is kept of a search beside the results, before its line says that it is done: a run keeps one tree a method."""
    if not isinstance(outcome, SearchResult) or outcome.snapshot is None:
        return
    if task.problem.index == 0:
        save_tree(output, task.method.label, outcome.snapshot)
    if evidence.is_kept(task.method):
        evidence.keep(task.method, task.problem.index, outcome.snapshot)


def in_process(load: Callable[[str], object] | None = None) -> Execute:
    """Makes searches in this process, method after method; `load` replaces `load_model`."""

    def execute(config: EvaluationConfig, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        from sdt_dist.models.loading import load_model

        loaded: Any = (load or load_model)(config.model)
        process = loaded.process(config.horizon)
        flow = _flow(config, tasks, loaded)
        for label in dict.fromkeys(task.method.label for task in tasks):
            own = [task for task in tasks if task.method.label == label]
            yield from _run_method(config, own, process, flow if own[0].method.uses_flow else None)

    return execute


def _flow(config: EvaluationConfig, tasks: Sequence[Task], loaded: Any) -> Flow | None:
    """The flow that tasks propose with, if any does; CheckpointError where it was trained for another model."""
    if not any(task.method.uses_flow for task in tasks):
        return None
    from sdt_dist.flow.flow import Flow as LearntFlow
    from sdt_dist.models.card import card_of

    files = config.flow_files()
    files.check_model(card_of(loaded, config.model))
    return LearntFlow.of(files)


def _run_method(
    config: EvaluationConfig, tasks: Sequence[Task], process: Process, flow: Flow | None
) -> Iterator[tuple[Task, Outcome]]:
    """The searches of one method, together."""
    by_index = {task.problem.index: task for task in tasks}
    method = tasks[0].method
    factory = parse_reward(config.reward_of(method))
    searches = []
    for task in tasks:
        try:
            reward = factory.build(RewardContext.of(task.problem.context))
            searches.append(
                SearchProblem(task.problem.index, process.root(task.problem.context), reward)
            )
        except SdtError as error:
            yield task, error
    runs = run_searches(
        process,
        searches,
        method=method.name,
        options=config.options_of(method),
        seed=config.seed,
        in_flight=config.problems_in_flight,
        sharing=tasks[0].sharing,
        flow=flow,
    )
    for index, outcome in runs:
        yield by_index[index], outcome
