"""One file per method and one registry: a method is its options and a generator over a session (SPEC 1.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sdt_dist.errors import unknown_name
from sdt_dist.search.driver import Search
from sdt_dist.search.options import SearchOptions, parse_options
from sdt_dist.search.session import Session


@dataclass(frozen=True, slots=True)
class Method:
    """A search method: its validated options and `run(session) -> generator` that returns a SearchResult."""

    name: str
    options: type[SearchOptions]
    run: Callable[[Session], Search]
    reference: bool = False  # a reference line outside the matched budget


_MODULES = {
    "greedy": "sampling",
    "sample": "sampling",
    "best_of_n": "sampling",
    "snis": "sampling",
    "beam": "beam",
    "smc": "smc",
    "mcts": "mcts",
    "dts": "dts",
    "dts_star": "dts",
    "maxent_ts": "maxent_ts",
    "residual_ts": "residual_ts",
}


def method_names() -> list[str]:
    """All registered methods, baselines first."""
    return list(_MODULES)


def get_method(name: str) -> Method:
    """The method called `name`; ConfigurationError with a suggestion otherwise."""
    if name not in _MODULES:
        raise unknown_name("method", name, _MODULES)
    return import_module(f"sdt_dist.search.methods.{_MODULES[name]}").METHODS[name]


def validate_options(name: str, options: dict[str, Any]) -> SearchOptions:
    """The method's options, checked; nothing heavy happens before this."""
    method = get_method(name)
    return parse_options(method.options, options, f"method {name!r}")
