"""An evaluation's searches as a fleet's work: one search a line, or a team of them where evidence is shared.

See docs/architecture/fleet.md, docs/concepts/exactness.md#shared-evidence. Both executors do what
`evaluation.executor.Executor` says.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.fleet import Watch, ask, run_fleet
from sdt_dist.actors.work import Loader, SpecReward, Work, load_spec
from sdt_dist.errors import SdtError
from sdt_dist.evaluation.executor import Assignment, Outcome
from sdt_dist.evaluation.plan import Plan
from sdt_dist.search.result import SearchResult
from sdt_dist.search.sharing_plan import MissingWalksError, merge_members

_TEAM_STARTS = 3
_WAIT_S = 20.0
_SILENCE_S = 120.0


class OnFleet:
    """Makes an evaluation's searches on a fleet of its own.

    loader: replaces `load_model` in the servers of the run's own model. watch: told the fleet's state about once a second.
    connect: makes what Ray is connected within, entered when the first search is wanted; default: it is connected already.
    """

    def __init__(
        self,
        size: FleetConfig,
        *,
        loader: Loader | None = None,
        watch: Watch | None = None,
        connect: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._size = size
        self._loader = loader
        self._watch = watch
        self._connect = connect

    def run(
        self, plan: Plan, assignments: Sequence[Assignment]
    ) -> Iterator[tuple[Assignment, Outcome]]:
        """Each assignment with its outcome; a team that lost walks with a shard is begun again, three starts at most."""
        with self._connect():
            todo = list(assignments)
            for start in range(_TEAM_STARTS):
                is_last = start + 1 == _TEAM_STARTS
                todo = yield from self._start(plan, todo, start, is_last)
                if not todo:
                    return

    def _start(
        self, plan: Plan, assignments: Sequence[Assignment], start: int, is_last: bool
    ) -> Generator[tuple[Assignment, Outcome], None, list[Assignment]]:
        """Every assignment's team once; returns those to begin again, as a shard was lost with its machine."""
        teams = [_Team(plan, assignment, start) for assignment in assignments]
        by_name = {work.name: team for team in teams for work in team.work}
        flow = plan.flow if any(assignment.method.flow for assignment in assignments) else None
        runs = run_fleet(
            [work for team in teams for work in team.work],
            self._size,
            self._loader or partial(load_spec, plan.config.model),
            max_new_tokens=plan.config.horizon,
            flows=[] if flow is None else [flow],
            watch=self._watch,
        )
        again: list[Assignment] = []
        for name, outcome in runs:
            team = by_name[name]
            if not team.take(outcome):
                continue
            result = team.result()
            if isinstance(result, MissingWalksError) and not is_last:
                again.append(team.assignment)
            else:
                yield team.assignment, result
        return again


class OnExchange:
    """Makes an evaluation's searches on the fleet behind an exchange, an `ExchangeActor`'s handle; `client` names this evaluation.

    Evidence is not shared. Searches that end are yielded one by one and held by the exchange until the next one is asked for.
    """

    def __init__(self, exchange: Any, client: str) -> None:
        self._exchange = exchange
        self._client = client

    def run(
        self, plan: Plan, assignments: Sequence[Assignment]
    ) -> Iterator[tuple[Assignment, Outcome]]:
        """Each assignment with its outcome, as the exchange brings them; what was yielded is acknowledged at the next."""
        waiting: dict[str, Assignment] = {}
        work: list[Work] = []
        for assignment in assignments:
            for one in _Team(plan, assignment).work:
                own = replace(one, name=f"{self._client}/{one.name}")
                waiting[own.name] = assignment
                work.append(own)
        _tell(self._exchange.submit, self._client, work)
        try:
            kept: list[str] = []
            while waiting:
                found = _tell(self._exchange.collect, self._client, kept, _WAIT_S)
                kept = []
                for name, outcome in found:
                    yield waiting.pop(name), outcome
                    kept.append(name)
        finally:
            _tell(self._exchange.leave, self._client)


def _tell(method: Any, *arguments: Any) -> Any:
    return ask(method, *arguments, timeout_s=_SILENCE_S, who="the sweep's exchange")


class _Team:
    """The searches of one line, and what came of them; start: how often the team began before."""

    def __init__(self, plan: Plan, assignment: Assignment, start: int = 0) -> None:
        self.assignment = assignment
        self.work = _work_of(plan, assignment, start)
        self._outcomes: list[Outcome] = []

    def take(self, outcome: Outcome) -> bool:
        """Note one search's outcome; True when that was the last."""
        self._outcomes.append(outcome)
        return len(self._outcomes) == len(self.work)

    def result(self) -> Outcome:
        """The line's outcome: the team's merged result, or the first error."""
        errors = [outcome for outcome in self._outcomes if isinstance(outcome, SdtError)]
        results = [outcome for outcome in self._outcomes if isinstance(outcome, SearchResult)]
        if errors:
            return errors[0]
        if self.work[0].membership is None:
            return results[0]
        try:
            return merge_members(results)
        except MissingWalksError as error:
            return error


def _work_of(plan: Plan, assignment: Assignment, start: int) -> list[Work]:
    """One search, or one for every member of the problem's team."""
    method = assignment.method
    problem = assignment.problem
    alone = Work(
        name=f"{method.label}/{problem.index}",
        problem=problem.index,
        context=problem.context,
        reward=SpecReward.of(method.reward.spec),
        method=method.name,
        options=method.options,
        seed=plan.config.seed,
        keep_tree=assignment.keeps_search,
        flow=method.flow,
    )
    if assignment.sharing is None:
        return [alone]
    sharing = assignment.sharing if start == 0 else assignment.sharing.again(start)
    work = []
    for member in sharing.members(problem.index):
        if member is None:
            work.append(alone)
        else:
            name = f"{alone.name}/{member.searcher}"
            work.append(replace(alone, name=name, membership=member))
    return work
