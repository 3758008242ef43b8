"""A fleet as its user sees it: searches go in, results come out, in whatever order they end.

See docs/architecture/fleet.md.

The driver writes results where its user wants them and acknowledges each one when it is on disk; only then does the
controller forget it. Killed at any instant, a run goes on with what is on disk.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sdt_dist.extras import packages_of

with packages_of("cluster", "the fleet"):
    import ray
    from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.controller.controller import Report
from sdt_dist.actors.learner import LearningPlan
from sdt_dist.actors.remote.controller import ControllerActor
from sdt_dist.actors.remote.endpoint import reason
from sdt_dist.actors.searcher import Outcome
from sdt_dist.actors.work import Loader, Work
from sdt_dist.errors import FleetError, SdtError
from sdt_dist.flow.files import FlowFiles

_REPORT_S = 1.0
_IDLE_S = 0.2
Watch = Callable[[dict[str, Any]], None]
Feed = Callable[[dict[str, Any]], Sequence[Work] | None]


def run_fleet(
    work: Sequence[Work],
    config: FleetConfig,
    loader: Loader,
    *,
    max_new_tokens: int,
    law_options: dict[str, Any] | None = None,
    flows: Sequence[FlowFiles] = (),
    watch: Watch | None = None,
    feed: Feed | None = None,
    plan: LearningPlan | None = None,
) -> Iterator[tuple[str, Outcome]]:
    """Make searches on a fleet of the Ray instance that is connected; yields (name, outcome) as each ends.

    An outcome that was yielded counts as kept when the next one is asked for. `watch` is told the fleet's state about
    once a second. `flows`: those that work names, the newest last. `feed` is asked as often for further work; None ends
    the run, whatever is under way. `plan`: what is learnt meanwhile. Raises FleetError when the fleet cannot go on.
    """
    # Beside its driver, with which it ends; a soft affinity is none for an actor that asks for no CPU (Ray 2.60).
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    namespace = (
        f"sdt-{secrets.token_hex(4)}"  # of this run: names of an earlier one may still be taken
    )
    arguments = {"max_new_tokens": max_new_tokens, "law_options": law_options, "flows": list(flows)}
    controller = ControllerActor.options(
        name="sdt:controller",
        namespace=namespace,
        num_cpus=0,
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=here,
    ).remote(config, loader, list(work), arguments, namespace, plan)
    try:
        ask(controller.start, timeout_s=config.start_timeout_s)
        acknowledged: list[str] = []
        while True:
            report: Report = ask(
                controller.next_report, acknowledged, _REPORT_S, timeout_s=config.start_timeout_s
            )
            if watch is not None:
                watch(report.status)
            if report.finished and feed is None:
                return
            acknowledged = []
            for name, outcome in report.results:
                yield name, outcome
                acknowledged.append(name)
            if feed is None:
                continue
            more = feed(report.status)
            if more is None:
                return
            if more:
                ask(controller.add_work, list(more), timeout_s=config.start_timeout_s)
            elif report.finished:
                time.sleep(_IDLE_S)  # a report of a fleet that has nothing to do comes at once
    finally:
        _end(controller)


def ask(method: Any, *arguments: Any, timeout_s: float, who: str = "the controller") -> Any:
    """An actor's answer, `who` in messages; asked again while it cannot be reached. FleetError where none comes."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(method.remote(*arguments), timeout=timeout_s)
        except ActorUnavailableError as error:
            if time.monotonic() > deadline:
                raise FleetError(f"{who} cannot be reached; run again with --resume.") from error
            time.sleep(0.1)
        except ActorDiedError as error:
            raise FleetError(
                f"{who} died ({reason(error)}); finished work is kept, run again with --resume."
            ) from error
        except GetTimeoutError as error:
            raise FleetError(
                f"waited {timeout_s:.0f} s for {who}; run again with --resume."
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, SdtError):
                raise error.cause from None
            raise


def _end(controller: Any) -> None:
    """Stop the fleet; whatever is left of it dies with its controller."""
    if not ray.is_initialized():
        return  # it ended with its Ray, and a call would start another one
    try:
        ray.get(controller.stop.remote(), timeout=10)
    except (ActorDiedError, ActorUnavailableError, GetTimeoutError):
        pass
    finally:
        ray.kill(controller)
