"""The search space of a sweep: which parameters there are, which methods have them, and how Optuna is asked for them.

Define-by-run: a trial has its method's own parameters and no others. It must not know budgets, objectives or Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from pydantic import Field

from sdt_dist.errors import ConfigurationError, unknown_name
from sdt_dist.evaluation.config import MethodConfig
from sdt_dist.search.methods import get_method, method_names
from sdt_dist.search.options import StrictOptions, parse_options

Value = bool | int | float | str | None
Parameters = dict[str, Any]
# every method's; other names are its own options
COMMON = {
    "inverse_temperature": float,
    "gamma": float,
    "rollouts": int,
}
BUDGETS = ("rollouts", "max_nfe")
_FIXED = {
    "num_samples": "metrics need the same number of samples in every trial; set it in `evaluation`",
    "num_rollouts": "it is called rollouts here",
    "time_budget_s": "what a time budget buys depends on what else runs",
}
_MOST_TRIED = 2000


class Range(StrictOptions):
    """Numbers from low to high, both included; log: drawn by their logarithm. Whole numbers where the parameter is one."""

    low: float | int
    high: float | int
    log: bool = Field(False, description="whether to draw by the logarithm")


Domain = Range | list[Value]


@dataclass(frozen=True)
class Space:
    """A sweep's space, as the function that Ray's OptunaSearch calls with an Optuna trial. Picklable."""

    methods: tuple[str, ...]
    domains: Mapping[str, Domain]

    def __call__(self, trial: Any) -> None:
        method = trial.suggest_categorical("method", list(self.methods))
        for name in self.names_of(method):
            _suggest(trial, name, self.domains[name], kind_of(name, method))

    def names_of(self, method: str) -> list[str]:
        """The parameters of this space that a method has."""
        return [name for name in self.domains if kind_of(name, method) is not None]

    def check(self) -> None:
        """ConfigurationError for a parameter that no method of the sweep has, or whose values cannot be its own."""
        for name, domain in self.domains.items():
            takers = [method for method in self.methods if kind_of(name, method) is not None]
            if name in _FIXED:
                raise ConfigurationError(f"space: {name} cannot be swept: {_FIXED[name]}.")
            if not takers:
                raise self._without_takers(name)
            if isinstance(domain, list):
                _check_choices(name, domain)
                continue
            _check_range(name, domain)
            if any(kind_of(name, method) not in (int, float) for method in takers):
                raise ConfigurationError(
                    f"space: {name} has no range of numbers; give a list of choices."
                )
            if any(kind_of(name, method) is int for method in takers) and not _is_whole(domain):
                raise ConfigurationError(
                    f"space: {name}: {domain.low} to {domain.high}, allowed: whole numbers."
                )

    def corners(self, method: str) -> Iterator[Parameters]:
        """Parameters to try before a sweep: all combinations of ends and choices, or where those are too many one after
        the other.
        """
        ends = {name: ends_of(self.domains[name]) for name in self.names_of(method)}
        base = {"method": method, **{name: values[0] for name, values in ends.items()}}
        if np.prod([len(values) for values in ends.values()], dtype=float) <= _MOST_TRIED:
            for chosen in itertools.product(*ends.values()):
                yield base | dict(zip(ends, chosen, strict=True))
            return
        for name, values in ends.items():
            yield from (base | {name: value} for value in values)

    def grid(self, name: str, points: int) -> list[Any]:
        """Values of a numeric parameter: its choices, or so many points of its range, ends included."""
        domain = self.domains[name]
        if isinstance(domain, list):
            return list(domain)
        spread = np.geomspace if domain.log else np.linspace
        inner = [float(f"{value:.6g}") for value in spread(domain.low, domain.high, points)[1:-1]]
        return [float(domain.low), *inner, float(domain.high)]

    def _without_takers(self, name: str) -> ConfigurationError:
        others = [
            method for method in (*method_names(), "s_adt") if kind_of(name, method) is not None
        ]
        if not others:
            known = {option for method in self.methods for option in _options_of(method)}
            return unknown_name(
                "parameter of the space", name, (known | COMMON.keys()) - _FIXED.keys()
            )
        return ConfigurationError(
            f"space: {name}, but none of the methods {', '.join(self.methods)} has it; {', '.join(others)} have. Add one of "
            "these to `methods`, or leave it out."
        )


def kind_of(name: str, method: str) -> Any:
    """The type of a method's parameter (int, float, bool, or object for what has choices only), None where it has none."""
    if name in COMMON:
        return COMMON[name]
    field = _options_of(method).get(name)
    if field is None:
        return None
    kinds = set(get_args(field.annotation) or (field.annotation,)) - {type(None)}
    return kinds.pop() if kinds in ({int}, {float}, {bool}) else object


def _options_of(method: str) -> dict[str, Any]:
    """The fields of a method's own options; `snis+flow` has those of snis."""
    return dict(get_method(MethodConfig.named(method).name).options.model_fields)


def check_form(name: str, domain: Any) -> None:
    """ConfigurationError for what is neither a list of choices nor a range, as it stands in a file."""
    if isinstance(domain, dict):
        parse_options(Range, domain, f"space, {name}")
    elif not isinstance(domain, (list, Range)):
        raise ConfigurationError(
            f"space: {name}: {domain!r}, allowed: a list of choices, or {{low, high, log}}."
        )


def ends_of(domain: Domain) -> list[Value]:
    """What to try of a domain: both ends, or every choice."""
    return list(domain) if isinstance(domain, list) else [domain.low, domain.high]


def _check_choices(name: str, choices: list[Value]) -> None:
    if not choices or len({repr(choice) for choice in choices}) < len(choices):
        raise ConfigurationError(
            f"space: {name}: {choices}, allowed: choices that differ, at least one."
        )


def _check_range(name: str, domain: Range) -> None:
    if not domain.low < domain.high:
        raise ConfigurationError(
            f"space: {name}: low {domain.low}, must be below high {domain.high}."
        )
    if domain.log and domain.low <= 0:
        raise ConfigurationError(
            f"space: {name}: low {domain.low}, must be above 0 with log: true."
        )


def _is_whole(domain: Range) -> bool:
    return type(domain.low) is int and type(domain.high) is int


def _suggest(trial: Any, name: str, domain: Domain, kind: type) -> None:
    if isinstance(domain, list):
        trial.suggest_categorical(name, domain)
    elif kind is int:
        trial.suggest_int(name, domain.low, domain.high, log=domain.log)
    else:
        trial.suggest_float(name, float(domain.low), float(domain.high), log=domain.log)
