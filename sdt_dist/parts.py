"""Contexts: what a model continues, as a sequence of parts (text, token ids, series).

What users give is read once, at the door, by `as_context`; everything behind it passes parts on and asks them for their
form. Each process says which forms it takes. This module must not know models, tasks or rewards.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sdt_dist.errors import ContextError

Form = Literal["text", "tokens", "series"]
_WORDS: dict[Form, str] = {"text": "a text", "tokens": "token ids", "series": "a series of numbers"}


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text, as people write it."""

    form: ClassVar[Form] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class TokensPart:
    """Token ids of the model that is asked."""

    form: ClassVar[Form] = "tokens"
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SeriesPart:
    """values [L] float64 of one series in the user's units, oldest first."""

    form: ClassVar[Form] = "series"
    values: np.ndarray


Part = TextPart | TokensPart | SeriesPart
Context = tuple[Part, ...]


def as_context(given: Any, takes: Collection[Form]) -> Context:
    """The parts of what a user gave: a string, token ids, a 1-D array of numbers, a part, or a context as it is.

    takes: the forms that the asked process takes; whole numbers are token ids where it takes those, and values of a series
    elsewhere. ContextError for anything else.
    """
    if isinstance(given, Part):
        return (given,)
    if isinstance(given, str):
        return (TextPart(given),)
    if isinstance(given, (tuple, list)) and given and all(isinstance(p, Part) for p in given):
        return tuple(given)
    return (_numbers(given, takes),)


def _numbers(given: Any, takes: Collection[Form]) -> TokensPart | SeriesPart:
    try:
        values = np.asarray(given)
        is_whole = values.ndim == 1 and (values.dtype.kind in "iu" or not len(values))
        if is_whole and ("tokens" in takes or "series" not in takes):
            return TokensPart(tuple(values.astype(np.int64).tolist()))
        return SeriesPart(values.astype(np.float64, copy=False))
    except (TypeError, ValueError) as error:
        raise ContextError(
            f"prompt: {type(given).__name__}, allowed: a string, token ids, a 1-D array of numbers, or parts."
        ) from error


def only_part(context: Context, takes: Collection[Form]) -> Part:
    """The part of a context of one part; ContextError for several, and for a form that is not taken."""
    allowed = " or ".join(_WORDS[form] for form in _WORDS if form in takes)
    if len(context) != 1:
        raise ContextError(
            f"prompt: {len(context)} parts, but this model takes one: {allowed}; give one part."
        )
    (part,) = context
    if part.form not in takes:
        raise ContextError(
            f"prompt: {_WORDS[part.form]}, but this model takes {allowed}; give it that."
        )
    return part
