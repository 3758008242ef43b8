"""A fleet as its user sees it: searches go in, results come out, in whatever order they end (SPEC section 4).

The driver writes results where its user wants them and acknowledges each one when it is on disk; only then does the
controller forget it. Killed at any instant, a run goes on with what is on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config import FleetConfig
from actors.controller import Report
from actors.remote import ControllerActor
from actors.searcher import Outcome
from actors.work import Loader, SpecReward, Work
from sdt_dist.errors import FleetError, SdtError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.runner import Execute, Task

_REPORT_S = 1.0
Watch = Callable[[dict[str, Any]], None]


def run_fleet(
    work: Sequence[Work],
    config: FleetConfig,
    loader: Loader,
    *,
    max_new_tokens: int,
    law_options: dict[str, Any] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[str, Outcome]]:
    """Make searches on a fleet of the Ray instance that is connected; yields (name, outcome) as each ends.

    An outcome that was yielded counts as kept when the next one is asked for. `watch` is told the fleet's state about
    once a second. Raises FleetError when the fleet cannot go on.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    controller = ControllerActor.options(
        name="sdt:controller", num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here
    ).remote(config, loader, list(work), {"max_new_tokens": max_new_tokens, "law_options": law_options})
    try:
        _ask(controller.start, timeout_s=config.start_timeout_s)
        acknowledged: list[str] = []
        while True:
            report: Report = _ask(controller.next_report, acknowledged, _REPORT_S, timeout_s=config.start_timeout_s)
            if watch is not None:
                watch(report.status)
            if report.finished:
                return
            acknowledged = []
            for name, outcome in report.results:
                yield name, outcome
                acknowledged.append(name)
    finally:
        _end(controller)


def _ask(method: Any, *arguments: Any, timeout_s: float) -> Any:
    """A controller's answer; asked again while it cannot be reached."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(method.remote(*arguments), timeout=timeout_s)
        except ActorUnavailableError as error:
            if time.monotonic() > deadline:
                raise FleetError("the controller cannot be reached; run again with --resume.") from error
            time.sleep(0.1)
        except ActorDiedError as error:
            raise FleetError("the controller died; finished work is kept, run again with --resume.") from error
        except GetTimeoutError as error:
            raise FleetError(f"waited {timeout_s:.0f} s for the controller; run again with --resume.") from error
        except RayTaskError as error:
            if isinstance(error.cause, SdtError):
                raise error.cause from None
            raise


def _end(controller: Any) -> None:
    """Stop the fleet; whatever is left of it dies with its controller."""
    try:
        ray.get(controller.stop.remote(), timeout=10)
    except (ActorDiedError, ActorUnavailableError, GetTimeoutError):
        pass
    finally:
        ray.kill(controller)


def on_fleet(config: FleetConfig, loader: Loader | None = None, watch: Watch | None = None) -> Execute:
    """Makes an evaluation's searches on a fleet; `loader` replaces `load_model` in the model servers."""

    def execute(evaluation: EvaluationConfig, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        by_name = {f"{task.method.label}/{task.problem.index}": task for task in tasks}
        reward = SpecReward.of(evaluation.reward)
        work = [
            Work(
                name=name,
                problem=task.problem.index,
                context=task.problem.history,
                reward=reward,
                method=task.method.name,
                options=evaluation.options_of(task.method),
                seed=evaluation.seed,
                keep_tree=task.keeps_tree,
            )
            for name, task in by_name.items()
        ]
        outcomes = run_fleet(
            work, config, loader or partial(_load, evaluation.model), max_new_tokens=evaluation.horizon, watch=watch
        )
        for name, outcome in outcomes:
            yield by_name[name], outcome

    return execute


def _load(spec: str) -> Any:
    from sdt_dist.models.loading import load_model

    return load_model(spec)
