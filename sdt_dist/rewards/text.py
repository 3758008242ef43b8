"""Rewards of texts: patterns, answers, length, and a reward model (SPEC section 2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.base import Reward, view_of


class Regex(Reward):
    """1 where the pattern is found in the text, else 0."""

    multipliers = {"regex": 1.0}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(f"regex: {pattern!r} is not a valid pattern ({error}).") from error

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        texts = view_of(samples, "text")
        return {"regex": np.array([float(self.pattern.search(text) is not None) for text in texts])}


class Answer(Reward):
    """1 where the text, without surrounding blanks and case, equals the answer."""

    multipliers = {"answer": 1.0}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, text: str) -> None:
        self.text = text.strip().casefold()

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        texts = view_of(samples, "text")
        return {"answer": np.array([float(text.strip().casefold() == self.text) for text in texts])}


class Length(Reward):
    """Minus the distance of the number of tokens from a target, as a share of the target."""

    multipliers = {"length": 1.0}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, target: float) -> None:
        if not target > 0:
            raise ConfigurationError(f"length: target={target}, must be > 0.")
        self.target = target

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        counts = np.array([len(sample.tokens) for sample in samples], dtype=np.float64)
        return {"length": -np.abs(counts - self.target) / self.target}
