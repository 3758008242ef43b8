"""Searches: methods as generators, the loop that tree methods share, and the driver that merges what they ask for.

May import: values, tree, models (processes), rewards and below; never evaluation or Ray. A search calls no model and no reward.
To add a method: see `methods/`. Public entry points load on demand, so that validating a configuration compiles no kernels.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_LAZY = {
    "run_searches": "sdt_dist.search.api",
    "search": "sdt_dist.search.api",
    "SearchProblem": "sdt_dist.search.session",
    "SearchResult": "sdt_dist.search.result",
    "method_names": "sdt_dist.search.methods",
    "method_options": "sdt_dist.search.api",
    "get_method": "sdt_dist.search.methods",
    "validate_options": "sdt_dist.search.methods",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sdt_dist.search' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


class _CallableModule(ModuleType):
    """Lets `sdt_dist.search(...)` be the function while `sdt_dist.search` stays the package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("sdt_dist.search.api").search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
