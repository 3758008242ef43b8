"""Rewards of finished samples: named raw terms with multipliers, which add and scale (SPEC section 2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from sdt_dist.errors import ConfigurationError, RewardError
from sdt_dist.protocols import Decoded

View = Literal["tokens", "text", "series"]


class Reward(ABC):
    """Scores finished samples of one problem. Subclasses give raw terms; `multipliers` weigh them.

    `a + b` and `0.5 * a` keep the terms apart. A reward with `has_partial` also scores unfinished samples, as a
    potential for SMC.
    """

    has_partial = False

    @property
    @abstractmethod
    def multipliers(self) -> dict[str, float]:
        """Weight of each term by name."""

    @abstractmethod
    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        """Raw terms [B] by name, before their multipliers."""

    def partial(self, samples: Sequence[Decoded]) -> np.ndarray:
        """Potential [B] of unfinished samples."""
        raise RewardError(f"reward {type(self).__name__} has no partial form.")

    def score(self, samples: Sequence[Decoded]) -> np.ndarray:
        """Rewards [B] float64; RewardError unless every term is finite and of shape [B]."""
        total = np.zeros(len(samples))
        for name, term in self.components(samples).items():
            values = np.asarray(term, dtype=np.float64)
            if values.shape != total.shape or not np.isfinite(values).all():
                raise RewardError(
                    f"reward term {name!r}: shape {values.shape} or not finite for {len(samples)} samples."
                )
            total += self.multipliers[name] * values
        return total

    def __add__(self, other: Reward) -> Reward:
        return SumReward([(1.0, self), (1.0, other)])

    def __rmul__(self, factor: float) -> Reward:
        return SumReward([(float(factor), self)])


class SumReward(Reward):
    """A weighted sum of rewards; a term name that occurs twice gets a number."""

    def __init__(self, parts: list[tuple[float, Reward]]) -> None:
        self.parts: list[tuple[float, Reward]] = []
        for factor, part in parts:
            inner = part.parts if isinstance(part, SumReward) else [(1.0, part)]
            self.parts += [(factor * weight, reward) for weight, reward in inner]
        self.has_partial = any(part.has_partial for _, part in self.parts)

    def _names(self) -> list[dict[str, str]]:
        seen: dict[str, int] = {}
        names = []
        for _, part in self.parts:
            mapping = {}
            for name in part.multipliers:
                seen[name] = seen.get(name, 0) + 1
                mapping[name] = name if seen[name] == 1 else f"{name}_{seen[name]}"
            names.append(mapping)
        return names

    @property
    def multipliers(self) -> dict[str, float]:
        pairs = zip(self.parts, self._names(), strict=True)
        return {names[n]: factor * m for (factor, part), names in pairs for n, m in part.multipliers.items()}

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        pairs = zip(self.parts, self._names(), strict=True)
        return {names[n]: term for (_, part), names in pairs for n, term in part.components(samples).items()}

    def partial(self, samples: Sequence[Decoded]) -> np.ndarray:
        return sum((f * part.partial(samples) for f, part in self.parts if part.has_partial), np.zeros(len(samples)))


class CallableReward(Reward):
    """A user's batched function of token lists, texts, or series [B, horizon]; it returns one float a sample."""

    def __init__(self, function: Callable[[Any], Any], view: View) -> None:
        self.function = function
        self.view: View = view
        self._name = getattr(function, "__name__", type(function).__name__)

    @property
    def multipliers(self) -> dict[str, float]:
        return {self._name: 1.0}

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        return {self._name: np.asarray(self.function(view_of(samples, self.view)), dtype=np.float64)}


def view_of(samples: Sequence[Decoded], view: View) -> Any:
    """Samples as a reward wants them; RewardError where a sample has no such view."""
    if view == "tokens":
        return [list(sample.tokens) for sample in samples]
    values = [getattr(sample, view) for sample in samples]
    if any(value is None for value in values):
        raise RewardError(f"reward: needs the {view} of samples, which this model's samples do not have.")
    return values if view == "text" else np.stack(values)


def series_of(samples: Sequence[Decoded]) -> np.ndarray:
    """Series [B, L] of samples; RewardError for samples of a language model."""
    return view_of(samples, "series")


def as_reward(reward: Any, default_view: View) -> Any:
    """A Reward as it is; any other callable wrapped with the model's default view."""
    if hasattr(reward, "components") and hasattr(reward, "multipliers"):
        return reward
    if callable(reward):
        return CallableReward(reward, default_view)
    raise ConfigurationError(f"reward: {type(reward).__name__}, allowed: a Reward, or a callable of finished samples.")
