"""Kills fleet actors at random instants while calls are in flight, and times what it takes to recover."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from tests.ray_helpers import actor_processes

_POLL_S = 0.03


@dataclass
class Recovery:
    """Kills of one kind: seconds from each until the replacement answered its probe, and until the next result."""

    kind: str
    replaced_s: list[float] = field(default_factory=list)
    result_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    notes: str = ""

    def line(self) -> str:
        """One row of the table."""

        def times(values: list[float]) -> str:
            return (
                f"{statistics.median(values):8.2f} {max(values):8.2f}"
                if values
                else f"{'-':>8} {'-':>8}"
            )

        kills = max(len(self.replaced_s), len(self.result_s))
        return f"{self.kind:<22} {kills:>5}   {times(self.replaced_s)}   {times(self.result_s)}   {self.wall_s:7.1f}   {self.notes}"


HEAD = (
    f"{'what was killed':<22} {'kills':>5}   {'replacement, s':^17}   {'next result, s':^17}   {'wall, s':>7}\n"
    + (f"{'':<22} {'':>5}   {'median':>8} {'worst':>8}   {'median':>8} {'worst':>8}")
)


class ControllerView:
    """Looks at the one controller that runs, without acknowledging anything."""

    def __init__(self) -> None:
        self._handle: Any = None

    def status(self) -> dict[str, Any] | None:
        """The fleet's state; None while there is no controller that answers."""
        try:
            if self._handle is None:
                names = ray.util.list_named_actors(all_namespaces=True)
                (found,) = [name for name in names if name["name"] == "sdt:controller"]
                self._handle = ray.get_actor(found["name"], namespace=found["namespace"])
            return ray.get(self._handle.next_report.remote([], 0.0), timeout=10).status
        except (ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None


class Killer(threading.Thread):
    """Kills `kills` actors of a kind, each when its kind is whole and searches are under way, SIGKILL and ray.kill in turn.

    `finished` is called when that is done. `error` holds what went wrong in the thread.
    """

    def __init__(
        self,
        kind: str,
        kills: int,
        seed: int,
        finished: Callable[[], None],
        timeout_s: float = 300.0,
    ) -> None:
        super().__init__(daemon=True, name=f"killer of {kind}")
        self.recovery = Recovery(kind)
        self.error = ""
        self._kind = kind
        self._kills = kills
        self._random = random.Random(seed)
        self._finished = finished
        self._deadline = time.monotonic() + timeout_s
        self._view = ControllerView()
        self._run_is_over = threading.Event()

    def stop(self) -> None:
        """The run is over, with or without the last kill."""
        self._run_is_over.set()
        self.join(30)

    def run(self) -> None:
        begin = time.monotonic()
        try:
            for number in range(self._kills):
                self._kill(number)
        except AssertionError as error:
            self.error = str(error)
        finally:
            self.recovery.wall_s = time.monotonic() - begin
            self._finished()

    def _until(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            status = self._view.status()
            if status is not None and condition(status):
                return status
            assert not self._run_is_over.is_set(), (
                f"the run was over while the {self._kind} killer waited for {what}"
            )
            assert time.monotonic() < self._deadline, (
                f"the {self._kind} killer waited for {what}; last state {status}"
            )
            time.sleep(_POLL_S)

    def _is_whole(self, status: dict[str, Any]) -> bool:
        slots = [slot for name, slot in status["slots"].items() if name.startswith(self._kind)]
        return (
            status["under_way"] > 0
            and bool(slots)
            and all(slot["state"] == "ready" for slot in slots)
        )

    def _kill(self, number: int) -> None:
        self._until("all actors to be ready and searches under way", self._is_whole)
        time.sleep(self._random.uniform(0.0, 0.5))  # the random instant
        before = self._until("searches under way", self._is_whole)
        slots = {
            name: slot for name, slot in before["slots"].items() if name.startswith(self._kind)
        }
        # the pause before a restart doubles with each death
        fewest = min(slot["deaths"] for slot in slots.values())
        victim = self._random.choice(
            [name for name, slot in slots.items() if slot["deaths"] == fewest]
        )
        begin = time.monotonic()
        if number % 2 == 0:
            os.kill(actor_processes()[victim], signal.SIGKILL)
        else:
            ray.kill(_handle(victim))
        deaths = before["slots"][victim]["deaths"]
        done = before["done"]
        self._until("a result", lambda s: s["done"] > done)
        self.recovery.result_s.append(time.monotonic() - begin)

        def is_back(status: dict[str, Any]) -> bool:
            slot = status["slots"][victim]
            return slot["deaths"] > deaths and slot["state"] == "ready"

        self._until(f"{victim} to be back", is_back)
        self.recovery.replaced_s.append(time.monotonic() - begin)


def _handle(place: str) -> Any:
    """The actor that holds a place now."""
    names = ray.util.list_named_actors(all_namespaces=True)
    (found,) = [n for n in names if n["name"].removeprefix("sdt:").partition(".")[0] == place]
    return ray.get_actor(found["name"], namespace=found["namespace"])
