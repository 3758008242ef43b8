"""Rewards of finished samples: named raw terms with multipliers, which add and scale.

See docs/guides/rewards.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdt_dist.errors import ConfigurationError, RewardError
from sdt_dist.parts import Form
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.checking import checked_partial, checked_terms, weighted_sum

View = Form


class Reward(ABC):
    """Scores finished samples of one problem. Subclasses give raw terms; `multipliers` weigh them.

    `a + b` and `0.5 * a` keep the terms apart. A reward with `has_partial` also scores unfinished samples, as a
    potential for SMC. `min_horizon` is the fewest values of a sample that it can score.
    """

    has_partial = False
    min_horizon = 1

    @property
    @abstractmethod
    def multipliers(self) -> dict[str, float]:
        """Weight of each term by name."""

    @property
    def label(self) -> str:
        """How error messages name this reward."""
        return type(self).__name__

    @abstractmethod
    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        """Raw terms [B] by name, before their multipliers."""

    def partial(self, samples: Sequence[Decoded]) -> np.ndarray:
        """Potential [B] of unfinished samples."""
        raise RewardError(f"reward {self.label} has no partial form.")

    def score(self, samples: Sequence[Decoded]) -> np.ndarray:
        """Rewards [B] float64; RewardError as in `weighted_sum`."""
        return weighted_sum(self, samples)[0]

    def __add__(self, other: Reward) -> Reward:
        return SumReward([(1.0, self), (1.0, other)])

    def __rmul__(self, factor: float) -> Reward:
        return SumReward([(factor, self)])


class SumReward(Reward):
    """A weighted sum of rewards; a term whose name is taken gets a number. ConfigurationError for a bad factor."""

    def __init__(self, parts: list[tuple[float, Reward]]) -> None:
        self.parts: list[tuple[float, Reward]] = []
        for factor, part in parts:
            if not isinstance(factor, (int, float, np.number)) or not np.isfinite(factor):
                raise ConfigurationError(
                    f"reward {part.label}: factor {factor!r}, allowed: a finite number."
                )
            inner = part.parts if isinstance(part, SumReward) else [(1.0, part)]
            self.parts += [(float(factor) * weight, reward) for weight, reward in inner]
        self.has_partial = any(part.has_partial for _, part in self.parts)
        self.min_horizon = max(part.min_horizon for _, part in self.parts)

    @property
    def label(self) -> str:
        return " + ".join(part.label for _, part in self.parts)

    def _names(self) -> list[dict[str, str]]:
        """For every part, the sum's name of each of its terms; all are different."""
        taken: set[str] = set()
        names = []
        for _, part in self.parts:
            mapping = {name: _free_name(name, taken) for name in part.multipliers}
            names.append(mapping)
        return names

    @property
    def multipliers(self) -> dict[str, float]:
        pairs = zip(self.parts, self._names(), strict=True)
        return {
            names[n]: factor * m
            for (factor, part), names in pairs
            for n, m in part.multipliers.items()
        }

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        pairs = zip(self.parts, self._names(), strict=True)
        return {
            names[n]: term
            for (_, part), names in pairs
            for n, term in checked_terms(part, samples).items()
        }

    def partial(self, samples: Sequence[Decoded]) -> np.ndarray:
        terms = (f * checked_partial(part, samples) for f, part in self.parts if part.has_partial)
        return sum(terms, np.zeros(len(samples)))


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or the first of name_2, name_3, ... that is free; it is taken from then on."""
    number = 2
    found = name
    while found in taken:
        found = f"{name}_{number}"
        number = number + 1
    taken.add(found)
    return found


class CallableReward(Reward):
    """A user's batched function of token lists, texts, or series [B, horizon]; it returns one float a sample.

    Its term has the function's name (`name` where the function has none of its own).
    """

    def __init__(self, function: Callable[[Any], Any], view: View, name: str | None = None) -> None:
        self.function = function
        self.view: View = view
        self._name = name or getattr(function, "__name__", type(function).__name__)

    @property
    def multipliers(self) -> dict[str, float]:
        return {self._name: 1.0}

    @property
    def label(self) -> str:
        return self._name

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        return {self._name: np.asarray(self.function(view_of(samples, self.view)))}


def view_of(samples: Sequence[Decoded], view: View) -> Any:
    """Samples as a reward wants them; RewardError where a sample has no such view."""
    if view == "tokens":
        return [list(sample.tokens) for sample in samples]
    values = [getattr(sample, view) for sample in samples]
    if any(value is None for value in values):
        raise RewardError(
            f"reward: needs the {view} of samples, which this model's samples do not have."
        )
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
    raise ConfigurationError(
        f"reward: {type(reward).__name__}, allowed: a Reward, or a callable of finished samples."
    )
