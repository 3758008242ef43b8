"""One file per method and one registry: a method is its options and a generator over a session.

To add a method: a file that ends with its `METHODS` entry, a line of `_MODULES` here, a line of the table in
docs/concepts/target.md#methods, and its place in the laws of tests/property. A tree method is a `TreeRule` for `loop.grow`:
selection, backup, expansion and leaf values are all in which it may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from sdt_dist.errors import ConfigurationError, unknown_name
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
    flow: Literal["none", "optional", "required"] = (
        "none"  # whether it proposes with a flow network
    )
    # what of the target changes none of its samples
    ignores: tuple[Literal["reward", "inverse_temperature"], ...] = ()

    def check_flow(self, is_given: bool) -> None:
        """ConfigurationError for a flow that the method has no use for, or for the lack of one that it needs."""
        if is_given and self.flow == "none":
            raise ConfigurationError(
                f"flow: given, but method {self.name!r} does not use one; allowed with s_adt, smc and snis. Leave it out, "
                "or choose one of these methods."
            )
        if not is_given and self.flow == "required":
            raise ConfigurationError(
                f"method {self.name!r}: it needs a flow network; give one (--flow PATH; flow= in Python), or use "
                "residual_ts, which is the same sampler without a flow."
            )


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
    "s_adt": "s_adt",
}
_NEED_A_FLOW = ("s_adt",)


def method_names() -> list[str]:
    """All registered methods that need nothing but a model and a reward, baselines first."""
    return [name for name in _MODULES if name not in _NEED_A_FLOW]


def get_method(name: str) -> Method:
    """The method called `name`; ConfigurationError with a suggestion otherwise."""
    if name not in _MODULES:
        raise unknown_name("method", name, _MODULES)
    return import_module(f"sdt_dist.search.methods.{_MODULES[name]}").METHODS[name]


def validate_options(name: str, options: dict[str, Any]) -> SearchOptions:
    """The method's options, checked; nothing heavy happens before this."""
    method = get_method(name)
    return parse_options(method.options, options, f"method {name!r}")
