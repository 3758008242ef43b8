"""The view of a run on stderr: a bar with the time that is left, and under it what the fleet does right now."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sdt_dist.cluster.bars import note_console, progress_bar
from sdt_dist.evaluation.results import Line
from sdt_dist.evaluation.runner import Progress

_RATES = {"rows": "rows/s", "tokens": "tokens/s", "nfe": "nfe/s"}


class LiveView(Progress):
    """One tick a finished problem and method; `watch` takes the fleet's state about once a second."""

    def __init__(self) -> None:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = note_console()
        name = TextColumn("{task.description:<14}", markup=False)
        self._bar = progress_bar(name, *columns, console=console)
        self._task = self._bar.add_task("starting", total=None)
        self._live = Live(
            self._group(""), console=console, refresh_per_second=4, redirect_stdout=False
        )
        self._rates = Rates()

    def __enter__(self) -> LiveView:
        if self._live.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(self._bar)
        self._live.stop()

    def start(self, total: int) -> None:
        self._bar.reset(self._task, total=total, description="starting")

    def done(self, line: Line) -> None:
        self._bar.update(self._task, advance=1, description=line["label"])
        if line["status"] != "ok":
            self.say(f"{line['label']} on {line['name']} failed: {' '.join(line['error'].split())}")

    def at(self, completed: int, description: str) -> None:
        """Set the bar, where work is not counted by lines."""
        self._bar.update(self._task, completed=completed, description=description)

    def watch(self, status: dict[str, Any]) -> None:
        """Show the fleet's state."""
        self._live.update(self._group(fleet_line(status, self._rates.of(status))))

    def say(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _group(self, line: str) -> Group:
        return Group(self._bar, Text(line, style="dim", no_wrap=True, overflow="ellipsis"))


class Rates:
    """Growth per second of the model servers' counters between two looks."""

    def __init__(self) -> None:
        self._before: tuple[float, dict[str, float]] | None = None

    def of(self, status: dict[str, Any], now: float | None = None) -> dict[str, float]:
        """{name: per second} since the last look; {} at the first and after a server was replaced."""
        now = time.monotonic() if now is None else now
        servers = [
            slot for name, slot in status["slots"].items() if name.startswith("model-server")
        ]
        sums = {name: float(sum(slot.get(name, 0) for slot in servers)) for name in _RATES}
        before = self._before
        self._before = (now, sums)
        if (
            before is None
            or now <= before[0]
            or any(sums[name] < before[1][name] for name in _RATES)
        ):
            return {}
        return {name: (sums[name] - before[1][name]) / (now - before[0]) for name in _RATES}


def fleet_line(status: dict[str, Any], rates: dict[str, float]) -> str:
    """One line: actors by kind and state, searches under way, rates, and whatever is not well."""
    kinds: dict[str, list[str]] = {}
    for name, slot in status["slots"].items():
        kinds.setdefault(name.rpartition("-")[0], []).append(slot["state"])
    parts = [
        f"{kind} {states.count('ready')}/{len(states)} ready" for kind, states in kinds.items()
    ]
    parts.append(f"{status['under_way']} under way, {status['waiting']} waiting")
    parts += [f"{rates[name]:,.0f} {unit}" for name, unit in _RATES.items() if name in rates]
    return "  ".join(
        [
            *parts,
            *(_ailment(name, slot) for name, slot in status["slots"].items() if slot["deaths"]),
        ]
    )


def _ailment(name: str, slot: dict[str, Any]) -> str:
    """What is to be said of an actor that died: why it is not back, or how often it was started again."""
    return (
        f"{name} restarted {slot['deaths']}x"
        if slot["state"] == "ready"
        else f"{name} {slot['state']}: {slot['reason']}"
    )
