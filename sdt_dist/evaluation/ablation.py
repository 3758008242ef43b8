"""Ablations: an evaluation's methods at every point of a product of parameter values.

See docs/guides/evaluate.md.

Each point becomes a plain method with options, reward and label of its own, so nothing that runs a method knows of ablations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from sdt_dist.errors import ConfigurationError, unknown_name
from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.evaluation.labels import family, suffix
from sdt_dist.evaluation.method_options import matched_budget, options_of
from sdt_dist.rewards.spec import with_gamma
from sdt_dist.search.methods import get_method, validate_options

Point = dict[str, int | float]
Ablation = dict[str, list[int | float]]

PARAMETERS = ("rollouts", "expansion_k", "lambda", "gamma", "alpha", "block_size")
_OPTIONS = {name: name for name in ("expansion_k", "alpha", "block_size")} | {
    "lambda": "inverse_temperature"
}
_ALIASES = {"inverse_temperature": "lambda"}
_REALS = ("lambda", "gamma", "alpha")


def parse_ablations(items: Iterable[str]) -> Ablation:
    """The values of `rollouts=5,10,20` and the like, one parameter an item; ConfigurationError for anything else."""
    found: Ablation = {}
    for item in items:
        name, equals, values = (part.strip() for part in item.partition("="))
        if not equals or not name:
            raise ConfigurationError(
                f"ablate: {item!r}, allowed: parameter=value,value,..., such as rollouts=5,10,20."
            )
        if name in found:
            raise ConfigurationError(
                f"ablate: {name} is given twice; put all its values into one {name}=...."
            )
        found[name] = [_number(name, text.strip()) for text in values.split(",")]
    return found


def _number(name: str, text: str) -> int | float:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    raise ConfigurationError(f"ablate: {name}={text!r}, allowed: numbers, such as {name}=5,10,20.")


def expanded(config: EvaluationConfig) -> EvaluationConfig:
    """The configuration with a method for every point of its ablation in place of each method that has its parameters.

    A method with some of them is at the points of those, one with none stays as it is, and so does one that is at a point
    already: what was expanded can be expanded again. ConfigurationError names a parameter that is unknown, given twice or
    had by no method, and values that a method refuses.
    """
    if not config.ablate:
        return config
    ablation = _canonical(config.ablate)
    methods: list[str | MethodConfig] = []
    for given, method in zip(config.methods, config.method_configs(), strict=True):
        points = [] if method.ablated else [point for point in _points(ablation, method) if point]
        methods += [_at(config, method, point) for point in points] or [given]
    for name in ablation:
        if not any(_has(method, name) for method in config.method_configs()):
            raise ConfigurationError(
                f"ablate: {name}, but none of the methods {', '.join(m.label for m in config.method_configs())} has it; "
                "leave it out, or add a method that has."
            )
    return config.model_copy(update={"ablate": ablation, "methods": methods})


def check_points(config: EvaluationConfig) -> None:
    """ConfigurationError unless the methods are what `expanded` makes of this ablation."""
    ablation = _canonical(config.ablate)
    for method in config.method_configs():
        if (
            method.ablated not in _points(ablation, method)
            or _at(config, method, method.ablated) != method
        ):
            raise ConfigurationError(
                f"methods: {method.label} is not what ablate: {config.ablate} makes of it (ablated: {method.ablated}); leave "
                "--ablate and changes to an expanded configuration out, or take its methods as they were before."
            )


def _canonical(given: Mapping[str, Sequence[int | float]]) -> Ablation:
    """Parameters by their own names, values of one type."""
    found: Ablation = {}
    for alias, values in given.items():
        name = _ALIASES.get(alias, alias)
        if name not in PARAMETERS:
            raise unknown_name("parameter of ablate", alias, [*PARAMETERS, *_ALIASES])
        if name in found:
            raise ConfigurationError(
                f"ablate: {name} is given twice, as {alias} too; give it once."
            )
        if not values or len(set(values)) < len(values):
            raise ConfigurationError(
                f"ablate: {alias}={list(values)}, allowed: one or more values, each of them once."
            )
        found[name] = [float(value) for value in values] if name in _REALS else list(values)
    return found


def _has(method: MethodConfig, name: str) -> bool:
    """Whether a parameter changes what a method does: reference methods have no budget."""
    chosen = get_method(method.name)
    if name == "rollouts":
        return not chosen.reference
    if name == "gamma":
        return "reward" not in chosen.ignores
    option = _OPTIONS.get(name)
    return option in chosen.options.model_fields and option not in chosen.ignores


def _points(ablation: Mapping[str, Sequence[int | float]], method: MethodConfig) -> list[Point]:
    """The product of the values that concern a method, the last parameter fastest; [{}] where none does."""
    own = {name: values for name, values in ablation.items() if _has(method, name)}
    return [dict(zip(own, values, strict=True)) for values in product(*own.values())]


def _at(config: EvaluationConfig, method: MethodConfig, point: Point) -> MethodConfig:
    """The method at a point. ConfigurationError for a value that it refuses."""
    if not point:
        return method
    label = f"{family(method)}{suffix(point)}"
    try:
        found = method.model_copy(
            update={
                "options": _options_at(config, method, point),
                "reward": _reward_at(config, method, point),
                "label": label,
                "ablated": point,
            }
        )
        validate_options(found.name, options_of(config, found))
    except ConfigurationError as error:
        raise ConfigurationError(f"ablate: {label}: {error}") from error
    return found


def _options_at(config: EvaluationConfig, method: MethodConfig, point: Point) -> dict[str, Any]:
    options: dict[str, Any] = dict(method.options)
    for name, value in point.items():
        if name == "rollouts":
            options |= matched_budget(config, value)
        elif name != "gamma":
            options[_OPTIONS[name]] = value
    return options


def _reward_at(config: EvaluationConfig, method: MethodConfig, point: Point) -> str | None:
    if "gamma" not in point:
        return method.reward
    return with_gamma(config.reward_of(method), point["gamma"])
