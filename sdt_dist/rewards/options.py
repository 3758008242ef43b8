"""Option values of a REWARD SPEC, read by the annotation of the parameter that takes them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from sdt_dist.errors import ConfigurationError


def read_options(name: str, make: Callable[..., Any], text: str) -> dict[str, Any]:
    """Options `key=value,...` of the reward `name` as keyword arguments of `make`.

    ConfigurationError names the reward, the option, its value and what is allowed; options without a default must be
    given. The parameter `history` or `reference` comes from the problem, not from the text.
    """
    parameters = {
        p.name: p
        for p in inspect.signature(make, eval_str=True).parameters.values()
        if p.name not in ("history", "reference")
    }
    options: dict[str, Any] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in parameters:
            raise ConfigurationError(
                f"reward {name}: option {item!r}, allowed: {', '.join(parameters) or 'none'}."
            )
        if key in options:
            raise ConfigurationError(
                f"reward {name}: option {key!r} is given twice, allowed: once."
            )
        options[key] = read_value(name, key, value, parameters[key].annotation)
    missing = [
        p.name for p in parameters.values() if p.default is p.empty and p.name not in options
    ]
    if missing:
        raise ConfigurationError(f"reward {name}: option {missing[0]!r} is missing.")
    return options


def read_value(name: str, option: str, text: str, annotation: Any) -> Any:
    """A value as its annotation says: float (finite), int, bool, a Literal of strings, or one of these or None."""
    if get_origin(annotation) is Literal:
        reader = _choice(get_args(annotation))
        allowed = ", ".join(get_args(annotation))
    else:
        kind = next(k for k in _READERS if k in (annotation, *get_args(annotation)))
        reader, allowed = _READERS[kind]
    try:
        return reader(text)
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            f"reward {name}: option '{option}={text}', allowed: {allowed}."
        ) from error


def write_number(value: float) -> str:
    """A number as people write it, which reads back as the same: 3 for 3.0."""
    return repr(value).removesuffix(".0")


def _choice(names: tuple[str, ...]) -> Callable[[str], Any]:
    return {name: name for name in names}.__getitem__


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (_finite, "a finite number"),
}
