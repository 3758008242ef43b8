"""Who makes a run's searches: what an executor must offer, and the one that uses this process.

See docs/guides/evaluate.md. Executors on a fleet are in `actors/evaluation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import SdtError
from sdt_dist.evaluation.plan import Plan, PlannedMethod
from sdt_dist.flow.files import FlowFiles
from sdt_dist.protocols import Flow, Process
from sdt_dist.rewards.context import RewardContext
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from sdt_dist.search.sharing_plan import SharingPlan

Outcome = SearchResult | SdtError


@dataclass(frozen=True, slots=True)
class Assignment:
    """One line of a run: a problem and the method that searches it, and how its searches share evidence (None: not)."""

    problem: ForecastProblem
    method: PlannedMethod
    sharing: SharingPlan | None = None
    keeps_search: bool = False


class Executor(Protocol):
    """Makes searches of a plan."""

    def run(
        self, plan: Plan, assignments: Sequence[Assignment]
    ) -> Iterator[tuple[Assignment, Outcome]]:
        """Each assignment with its outcome, in whatever order they end; an outcome counts as kept when the next is asked for.

        A problem whose reward or context fails is an SdtError as an outcome; what ends the whole run is raised.
        """
        ...


class InProcess:
    """Makes searches in this process, method after method; `load` replaces `load_model`."""

    def __init__(self, load: Callable[[str], Any] | None = None) -> None:
        self._load = load

    def run(
        self, plan: Plan, assignments: Sequence[Assignment]
    ) -> Iterator[tuple[Assignment, Outcome]]:
        from sdt_dist.models.loading import load_model

        model = (self._load or load_model)(plan.config.model)
        process = model.process(plan.config.horizon)
        flow = None
        if any(assignment.method.flow for assignment in assignments):
            flow = _flow_for(model, plan.config.model, plan.flow)
        by_label: dict[str, list[Assignment]] = {}
        for assignment in assignments:
            by_label.setdefault(assignment.method.label, []).append(assignment)
        for own in by_label.values():
            yield from _search(plan, own, process, flow if own[0].method.flow else None)


def _flow_for(model: Any, spec: str, files: FlowFiles | None) -> Flow:
    """The flow, built; CheckpointError where it was trained for another model."""
    from sdt_dist.flow.flow import Flow as LearntFlow
    from sdt_dist.models.card import card_of

    assert files is not None
    files.check_model(card_of(model, spec))
    return LearntFlow.of(files)


def _search(
    plan: Plan, assignments: Sequence[Assignment], process: Process, flow: Flow | None
) -> Iterator[tuple[Assignment, Outcome]]:
    """The searches of one method, together."""
    method = assignments[0].method
    by_index: dict[int, Assignment] = {}
    searches: list[SearchProblem] = []
    for assignment in assignments:
        problem = assignment.problem
        by_index[problem.index] = assignment
        try:
            reward = method.reward.build(RewardContext.of(problem.context))
            root = process.root(problem.context)
        except SdtError as error:
            yield assignment, error
            continue
        searches.append(SearchProblem(problem.index, root, reward))
    runs = run_searches(
        process,
        searches,
        method=method.name,
        options=method.options,
        seed=plan.config.seed,
        in_flight=plan.config.problems_in_flight,
        sharing=assignments[0].sharing,
        flow=flow,
    )
    for index, outcome in runs:
        yield by_index[index], outcome
