"""An evaluation's searches as a fleet's work: one search a line, or a team of them where evidence is shared.

See docs/architecture/fleet.md, docs/concepts/exactness.md#shared-evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.fleet import Watch, ask, run_fleet
from sdt_dist.actors.searcher import Outcome
from sdt_dist.actors.work import Loader, SpecReward, Work, load_spec
from sdt_dist.errors import SdtError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.runner import Execute, Task
from sdt_dist.search.result import SearchResult
from sdt_dist.search.sharing_plan import MissingWalksError, merge_members

_TEAM_STARTS = 3
_WAIT_S = 20.0
_SILENCE_S = 120.0


def on_fleet(
    config: FleetConfig, loader: Loader | None = None, watch: Watch | None = None
) -> Execute:
    """Makes an evaluation's searches on a fleet; `loader` replaces `load_model` in the servers of the run's own model."""

    def execute(
        evaluation: EvaluationConfig, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Outcome]]:
        load = loader or partial(load_spec, evaluation.model)
        todo = list(tasks)
        flows = [evaluation.flow_files()] if any(task.method.uses_flow for task in todo) else []
        flow = flows[0].identity if flows else None
        for start in range(_TEAM_STARTS):
            teams = {
                name: team
                for team in (_Team(evaluation, task, start, flow) for task in todo)
                for name in team.names
            }
            work = [one for team in dict.fromkeys(teams.values()) for one in team.work]
            todo = []
            runs = run_fleet(
                work, config, load, max_new_tokens=evaluation.horizon, flows=flows, watch=watch
            )
            for name, outcome in runs:
                team = teams[name]
                if not team.take(outcome):
                    continue
                result = team.result()
                if isinstance(result, MissingWalksError) and start + 1 < _TEAM_STARTS:
                    # a shard was lost with its machine: the team begins again
                    todo.append(team.task)
                else:
                    yield team.task, result
            if not todo:
                return

    return execute


def on_exchange(exchange: Any, client: str) -> Execute:
    """Makes an evaluation's searches on the fleet behind an exchange, an `ExchangeActor`'s handle; `client` names this evaluation.

    Evidence is not shared. Searches that end are yielded one by one and held by the exchange until the next one is asked for.
    """

    def execute(
        evaluation: EvaluationConfig, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Outcome]]:
        work = {
            f"{client}/{one.name}": (task, replace(one, name=f"{client}/{one.name}"))
            for task in tasks
            for one in _Team(evaluation, task, 0, evaluation.flow_identity).work
        }
        _tell(exchange.submit, client, [one for _, one in work.values()])
        try:
            kept: list[str] = []
            while work:
                found = _tell(exchange.collect, client, kept, _WAIT_S)
                kept = []
                for name, outcome in found:
                    task, _ = work.pop(name)
                    yield task, outcome
                    kept.append(name)
        finally:
            _tell(exchange.leave, client)

    return execute


def _tell(method: Any, *arguments: Any) -> Any:
    return ask(method, *arguments, timeout_s=_SILENCE_S, who="the sweep's exchange")


class _Team:
    """The searches of one line, and what came of them."""

    def __init__(self, config: EvaluationConfig, task: Task, start: int, flow: str | None) -> None:
        self.task = task
        self._outcomes = []
        plan = task.sharing if start == 0 or task.sharing is None else task.sharing.again(start)
        index = task.problem.index
        label = task.method.label
        alone = Work(
            name=f"{label}/{index}",
            problem=index,
            context=task.problem.context,
            reward=SpecReward.of(config.reward_of(task.method)),
            method=task.method.name,
            options=config.options_of(task.method),
            seed=config.seed,
            keep_tree=task.keeps_search,
            flow=flow if task.method.uses_flow else None,
        )
        members = [None] if plan is None else plan.members(index)
        self.work = [
            alone
            if member is None
            else replace(alone, name=f"{alone.name}/{member.searcher}", membership=member)
            for member in members
        ]
        self.names = [work.name for work in self.work]

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
