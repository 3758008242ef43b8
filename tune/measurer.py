"""One process of a sweep that computes metrics, since loading their libraries takes longer than a small trial's searches.

Stateless: what it measures is on disk, so Ray may restart it and ask again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdt_dist.extras import packages_of

with packages_of("tune", "a sweep"):
    import ray

from sdt_dist.actors.fleet import ask
from sdt_dist.actors.remote.backend import beside_us
from sdt_dist.evaluation.summary import recompute
from sdt_dist.tune.objectives import Measured, measure_directory

_RESTARTS = 3
_LIMIT_S = 600.0


@ray.remote
class MeasurerActor:
    """Summarises finished evaluations, and says what their objectives are."""

    def __init__(self) -> None:
        import sdt_dist.metrics.forecast  # noqa: F401 (while models load, not when the first trial waits)

    def measure(self, directory: Path) -> Measured:
        recompute(directory)
        return measure_directory(directory)

    def __repr__(self) -> str:
        return "measurer"


def start_measurer() -> Any:
    """A measurer on this node, where the output directory is; it ends with its driver."""
    options = {"max_concurrency": 1, "max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
    return beside_us(MeasurerActor, 0.0, options)


def measure(measurer: Any, directory: Path) -> Measured:
    """Every objective of a finished evaluation; errors as for `measure_directory`."""
    return ask(measurer.measure, directory, timeout_s=_LIMIT_S, who="the sweep's measurer")
