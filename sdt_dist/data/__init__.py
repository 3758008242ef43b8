"""Series: reading them, data sets by name or path, scales, synthetic series, and the forecast problems cut from them.

May import: protocols and below. To add a data set: a name in `registry.py` with where it comes from, its checksum and its
splits. To read another kind of file: `reader.py`, the one place where a user's file becomes series.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "Series": "sdt_dist.data.series",
    "ForecastProblem": "sdt_dist.data.problems",
    "load_problems": "sdt_dist.data.problems",
    "load_series": "sdt_dist.data.registry",
    "check_dataset": "sdt_dist.data.registry",
    "dataset_names": "sdt_dist.data.registry",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sdt_dist.data' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
