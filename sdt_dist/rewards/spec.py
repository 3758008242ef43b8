"""REWARD SPEC to rewards: `spectral:gamma=1+0.5*nonneg`, `bounds:low=0,high=80`, `regex:...`, `path.py:function`.

Parsing checks every name and option before a model loads; `build` then makes the reward of one problem.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdt_dist.errors import ConfigurationError, ContextError, unknown_name
from sdt_dist.parts import Form, SeriesPart
from sdt_dist.rewards.base import CallableReward, Reward, SumReward, View
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.forecast import Bounds, DtwTemplate, Smoothness, Total, nonneg
from sdt_dist.rewards.options import read_options, read_value, write_number
from sdt_dist.rewards.spectral import SpectralReward
from sdt_dist.rewards.text import Answer, Length, Regex, RewardModel
from sdt_dist.rewards.user_file import load_function, wants_context

_TERM = re.compile(r"^(?:(?P<factor>[-+\w.]+)\*)?(?P<name>[A-Za-z_]\w*)(?::(?P<options>.*))?$")
_PLUS = re.compile(r"(?<![0-9.][eE])\+(?=\s*(?:[-+\w.]+\*)?[A-Za-z_])")  # not the one of 1e+2
_STAND_IN = (SeriesPart(np.sin(np.arange(512.0))),)

FORECAST_TERMS: dict[str, Callable[..., Reward]] = {
    "spectral": SpectralReward,
    "bounds": Bounds,
    "nonneg": nonneg,
    "total": Total,
    "smoothness": Smoothness,
    "dtw": DtwTemplate,
}
TEXT_TERMS: dict[str, Callable[..., Reward]] = {"length": Length}
WEIGHTS = ("gamma",)  # options that are multipliers of a term
# stand alone: what follows the colon may hold any character
FREE_TEXT_TERMS = (
    "regex",
    "answer",
    "reward_model",
)


@dataclass(frozen=True, slots=True)
class RewardFactory:
    """A parsed REWARD SPEC, for refusing what cannot work before a model runs.

    `view` is what it scores: "series" (forecasts of at least `min_horizon` values), "text" (decoded answers of a
    language model), "tokens" (their token counts), or "any" (a user's function, which gets series or token lists).
    """

    spec: str
    view: Literal["series", "text", "tokens", "any"]
    _make: Callable[[RewardContext], Reward]
    min_horizon: int = 1

    def scores(self, sample_view: Form) -> bool:
        """Whether it may score samples of a model with this `sample_view`: series or not, text and tokens go together."""
        return self.view == "any" or (self.view == "series") == (sample_view == "series")

    @property
    def scores_forecasts(self) -> bool:
        """Whether it may score the samples of a forecaster."""
        return self.scores("series")

    @property
    def scores_text(self) -> bool:
        """Whether it may score the samples of a language model."""
        return self.scores("text")

    def check_horizon(self, horizon: int) -> None:
        """ContextError for forecasts too short for this reward."""
        if horizon < self.min_horizon:
            raise ContextError(
                f"reward {self.spec!r}: horizon {horizon}, must be >= {self.min_horizon}."
            )

    def build(self, context: RewardContext) -> Reward:
        """The reward of one problem; ContextError or ConfigurationError when its context does not fit."""
        return self._make(context)


def parse_reward(spec: str) -> RewardFactory:
    """Parse a REWARD SPEC; ConfigurationError names the term, what is wrong and what is allowed."""
    kind, colon, argument = spec.partition(":")
    if colon and kind in FREE_TEXT_TERMS:
        return _free_text_factory(spec, kind, argument)
    if _is_file(spec):
        return _file_factory(spec)
    parts = [_parse_term(term) for term in _terms_of(spec)]
    is_text = [name in TEXT_TERMS for _, name, _ in parts]
    if any(is_text) and not all(is_text):
        raise ConfigurationError(f"reward: {spec!r} mixes text and forecast terms.")

    def make(context: RewardContext) -> Reward:
        rewards = [(factor, _make_term(name, options, context)) for factor, name, options in parts]
        return rewards[0][1] if len(rewards) == 1 and rewards[0][0] == 1.0 else SumReward(rewards)

    # so that option values out of range are found now
    stand_in = RewardContext.of(_STAND_IN)
    return RewardFactory(
        spec, "tokens" if all(is_text) else "series", make, make(stand_in).min_horizon
    )


def reward_identity(spec: str) -> str:
    """What a REWARD SPEC's raw terms are, in order, without the factors and options that only weigh them.

    Specs with one identity have the same `components`, so walks scored by one are evidence for the other (docs/concepts/exactness.md#shared-evidence).
    A user's file counts by its content. ConfigurationError as in `parse_reward`.
    """
    file, _, name = spec.rpartition(":")
    if _is_file(spec):
        return f"{hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()}:{name}"
    terms = [_parse_term(term) for term in _terms_of(spec)]
    kept = [
        (name, sorted((k, v) for k, v in options.items() if k not in WEIGHTS))
        for _, name, options in terms
    ]
    return "+".join(f"{name}:{options}" for name, options in kept) or spec


def with_gamma(spec: str, gamma: float) -> str:
    """A REWARD SPEC whose spectral terms have this gamma, all else as it was; a term that has it already keeps its text.

    ConfigurationError where no term has a gamma, for spectral terms of different gammas (their ratio would be lost), and
    as in `parse_reward`.
    """
    terms = _terms_of(spec)
    gammas = {i: found for i, term in enumerate(terms) if (found := _gamma_of(term)) is not None}
    if not gammas:
        raise ConfigurationError(
            f"gamma: {gamma}, but reward {spec!r} has no spectral term; give one that has."
        )
    if len(set(gammas.values())) > 1:
        raise ConfigurationError(
            f"gamma: {gamma}, but the spectral terms of reward {spec!r} have the gammas {sorted(gammas.values())}; write "
            "their ratio as factors, such as 0.5*spectral+spectral:distance=kl."
        )
    if set(gammas.values()) == {float(gamma)}:
        return spec
    changed = "+".join(
        _regamma(term, gamma) if i in gammas else term for i, term in enumerate(terms)
    )
    parse_reward(changed)
    return changed


def _is_file(spec: str) -> bool:
    return re.search(r"\.py:\w+$", spec) is not None


def _terms_of(spec: str) -> list[str]:
    """The terms of a sum; none for a spec that stands alone."""
    kind, colon, _ = spec.partition(":")
    stands_alone = (colon and kind in FREE_TEXT_TERMS) or _is_file(spec)
    return [] if stands_alone else [term.strip() for term in _PLUS.split(spec)]


def _gamma_of(term: str) -> float | None:
    """The gamma of a spectral term, as given or by default; None for others."""
    _, name, options = _parse_term(term)
    if name != "spectral":
        return None
    return options.get("gamma", inspect.signature(SpectralReward).parameters["gamma"].default)


def _regamma(term: str, gamma: float) -> str:
    match = _TERM.match(term)
    assert match is not None
    others = [
        o
        for o in (match["options"] or "").split(",")
        if o.partition("=")[0].strip() not in ("gamma", "")
    ]
    factor = f"{match['factor']}*" if match["factor"] else ""
    return f"{factor}{match['name']}:{','.join([f'gamma={write_number(gamma)}', *others])}"


def _make_term(name: str, options: dict[str, Any], context: RewardContext) -> Reward:
    if name in TEXT_TERMS:
        return TEXT_TERMS[name](**options)
    if context.history is None:
        raise ConfigurationError(f"reward: {name!r} scores forecasts; this problem has no history.")
    return FORECAST_TERMS[name](context.history, **options)


def _parse_term(term: str) -> tuple[float, str, dict[str, Any]]:
    match = _TERM.match(term)
    if match is None:
        raise ConfigurationError(
            f"reward: term {term!r}, allowed: [factor*]name[:option=value,...], or path.py:function alone."
        )
    name = match["name"]
    if name.startswith("crps"):
        raise ConfigurationError(
            "reward: CRPS needs the true future, which no reward may see; use it as a metric only."
        )
    if name in FREE_TEXT_TERMS:
        raise ConfigurationError(
            f"reward: term {term!r}: {name}:... stands alone, without factor or sum, because its text may hold any "
            "character; add and scale such rewards in Python, or write a path.py:function."
        )
    known = FORECAST_TERMS | TEXT_TERMS
    if name not in known:
        raise unknown_name("reward", name, [*known, *FREE_TEXT_TERMS, "path.py:function"])
    factor = read_value(name, "factor", match["factor"] or "1", float)
    return factor, name, read_options(name, known[name], match["options"] or "")


def _free_text_factory(spec: str, kind: str, argument: str) -> RewardFactory:
    if not argument.strip():
        raise ConfigurationError(f"reward {kind}: nothing follows {spec!r}, allowed: {kind}:text.")
    if kind == "reward_model":
        RewardModel(argument, "")
        return RewardFactory(spec, "text", lambda context: RewardModel(argument, context.prompt))
    reward = Regex(argument) if kind == "regex" else Answer(argument)
    return RewardFactory(spec, "text", lambda context: reward)


def _file_factory(spec: str) -> RewardFactory:
    """A user's function of token lists or series; or, if it takes `context`, of those and the RewardContext."""
    file, _, name = spec.rpartition(":")
    function = load_function(Path(file), name)
    takes_context = wants_context(function)

    def make(context: RewardContext) -> Reward:
        view: View = "tokens" if context.history is None else "series"
        return CallableReward(
            partial(function, context=context) if takes_context else function, view, name
        )

    return RewardFactory(spec, "any", make)
