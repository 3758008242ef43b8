"""Shared by tests on real Ray: the worker processes of the fleet's actors, waiting for a condition, runs to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from actors.config import fleet_config
from actors.fleet import Watch, run_fleet
from actors.searcher import Outcome
from actors.work import Work


def actor_processes(of: int | None = None) -> dict[str, int]:
    """{actor's place, such as searcher-0: pid} of every fleet actor under a process; default: this one.

    Ray titles a worker after its actor: `ray::sdt:searcher-0.2`, the number after the point being the incarnation.
    """
    found = {}
    for process in psutil.Process(of).children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if title.startswith("ray::sdt:"):
            found[title.removeprefix("ray::sdt:").partition(" ")[0].partition(":")[0].partition(".")[0]] = process.pid
    return found


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
    for name, outcome in run_fleet(work, fleet_config(fleet), loader, max_new_tokens=max_new_tokens, watch=watch):
        assert name not in outcomes, f"{name} came twice"
        outcomes[name] = outcome
    return outcomes
