"""Tasks by name."""

from __future__ import annotations

from typing import Any

from sdt_dist.errors import unknown_name
from sdt_dist.tasks.forecast import FORECAST
from sdt_dist.tasks.task import Task

TASKS: dict[str, Task[Any]] = {FORECAST.name: FORECAST}


def get_task(name: str) -> Task[Any]:
    """The task of this name; ConfigurationError for an unknown one."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
