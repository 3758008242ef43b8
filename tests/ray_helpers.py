"""Shared by tests on real Ray: the worker processes of the fleet's actors, waiting for a condition, runs to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil
import ray

from sdt_dist.actors.config import fleet_config
from sdt_dist.actors.fleet import Watch, run_fleet
from sdt_dist.actors.searcher import Outcome
from sdt_dist.actors.work import Work


def actor_processes() -> dict[str, int]:
    """{actor's place, such as searcher-0: pid} of every fleet actor that Ray's table calls alive.

    The public state API needs the dashboard, which tests do without.
    """
    alive = [
        a
        for a in ray._private.state.actors().values()
        if a["State"] == "ALIVE" and a["Name"].startswith("sdt:")
    ]
    return {actor["Name"].removeprefix("sdt:").partition(".")[0]: actor["Pid"] for actor in alive}


def wait_for_deaths(pids: Iterable[int], timeout_s: float = 20.0) -> None:
    """Until none of these processes lives and Ray calls no fleet actor alive."""
    wait_until(
        lambda: not any(map(psutil.pid_exists, pids)), timeout_s, "the actors' processes to end"
    )
    wait_until(lambda: not actor_processes(), timeout_s, "the actors to end")


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The condition's value once it is true; fails and says what was waited for at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.02)
    return value


def run_all(
    work: Sequence[Work],
    loader: Callable[[], Any],
    *,
    max_new_tokens: int = 4,
    watch: Watch | None = None,
    **fleet: Any,
) -> dict[str, Outcome]:
    """All outcomes of a fleet by name; a name that comes twice fails."""
    outcomes: dict[str, Outcome] = {}
    for name, outcome in run_fleet(
        work, fleet_config(fleet), loader, max_new_tokens=max_new_tokens, watch=watch
    ):
        assert name not in outcomes, f"{name} came twice"
        outcomes[name] = outcome
    return outcomes
