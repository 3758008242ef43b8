"""REWARD SPEC to rewards: `spectral:gamma=1+0.5*nonneg`, `bounds:low=0,high=80`, `regex:...`, `path.py:function`.

Parsing checks every name and option before a model loads; `build` then makes the reward of one problem.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import ConfigurationError, unknown_name
from sdt_dist.rewards.base import CallableReward, Reward, SumReward, View

_TERM = re.compile(r"^(?:(?P<factor>[-+0-9.eE]+)\*)?(?P<name>[A-Za-z_]\w*)(?::(?P<options>.*))?$")


@dataclass(frozen=True, slots=True)
class RewardContext:
    """What a reward may see of a problem: its history [L] (forecasts) or prompt. Never the truth."""

    history: np.ndarray | None = None
    prompt: str | None = None


def _spectral(history: np.ndarray, gamma: float = 1.0, distance: str = "log_l1", segment: int | None = None) -> Reward:
    from sdt_dist.rewards.spectral import SpectralReward

    return SpectralReward(history, gamma, distance, None if segment is None else int(segment))  # type: ignore[arg-type]


def _bounds(
    history: np.ndarray, low: float = -np.inf, high: float = np.inf, hard: bool = False, floor: float = -1000.0
) -> Reward:
    from sdt_dist.rewards.forecast import Bounds

    return Bounds(history, low, high, hard, floor)


def _nonneg(history: np.ndarray, hard: bool = False, floor: float = -1000.0) -> Reward:
    return _bounds(history, low=0.0, hard=hard, floor=floor)


def _total(history: np.ndarray, value: float) -> Reward:
    from sdt_dist.rewards.forecast import Total

    return Total(history, value)


def _smoothness(history: np.ndarray) -> Reward:
    from sdt_dist.rewards.forecast import Smoothness

    return Smoothness(history)


def _dtw(history: np.ndarray) -> Reward:
    from sdt_dist.rewards.forecast import DtwTemplate

    return DtwTemplate(history)


def _length(target: float) -> Reward:
    from sdt_dist.rewards.text import Length

    return Length(target)


FORECAST_TERMS: dict[str, Callable[..., Reward]] = {
    "spectral": _spectral,
    "bounds": _bounds,
    "nonneg": _nonneg,
    "total": _total,
    "smoothness": _smoothness,
    "dtw": _dtw,
}
TEXT_TERMS: dict[str, Callable[..., Reward]] = {"length": _length}


@dataclass(frozen=True, slots=True)
class RewardFactory:
    """A parsed REWARD SPEC; `view` is what samples must offer ("any" for user functions)."""

    spec: str
    view: str
    _make: Callable[[RewardContext], Reward]

    def build(self, context: RewardContext) -> Reward:
        """The reward of one problem; ContextError or ConfigurationError when its context does not fit."""
        return self._make(context)


def parse_reward(spec: str) -> RewardFactory:
    """Parse a REWARD SPEC; ConfigurationError names the term, what is wrong and what is allowed."""
    if spec.startswith(("regex:", "answer:")):
        return _text_factory(spec)
    if re.search(r"\.py:\w+$", spec):
        return _file_factory(spec)
    parts = [_parse_term(term.strip()) for term in re.split(r"\+(?=\s*(?:[0-9.eE-]+\*)?[A-Za-z_])", spec)]
    is_text = [name in TEXT_TERMS for _, name, _ in parts]
    if any(is_text) and not all(is_text):
        raise ConfigurationError(f"reward: {spec!r} mixes text and forecast terms.")

    def make(context: RewardContext) -> Reward:
        rewards = []
        for factor, name, options in parts:
            if name in TEXT_TERMS:
                rewards.append((factor, TEXT_TERMS[name](**options)))
            elif context.history is None:
                raise ConfigurationError(f"reward: {name!r} scores forecasts; this problem has no history.")
            else:
                rewards.append((factor, FORECAST_TERMS[name](context.history, **options)))
        return rewards[0][1] if len(rewards) == 1 and rewards[0][0] == 1.0 else SumReward(rewards)

    _try_out(make, spec, all(is_text))
    return RewardFactory(spec, "tokens" if all(is_text) else "series", make)


def _try_out(make: Callable[[RewardContext], Reward], spec: str, is_text: bool) -> None:
    """Build once on a stand-in history, so that bad option values are found now."""
    make(RewardContext() if is_text else RewardContext(history=np.sin(np.arange(512.0))))


def _parse_term(term: str) -> tuple[float, str, dict[str, Any]]:
    match = _TERM.match(term)
    if match is None:
        raise ConfigurationError(f"reward: term {term!r}, allowed: [factor*]name[:option=value,...].")
    name = match["name"]
    if name.startswith("crps"):
        raise ConfigurationError(
            "reward: CRPS needs the true future, which no reward may see; use it as a metric only."
        )
    known = FORECAST_TERMS | TEXT_TERMS
    if name not in known:
        raise unknown_name("reward", name, [*known, "regex", "answer", "path.py:function"])
    allowed = [p for p in inspect.signature(known[name]).parameters if p != "history"]
    options: dict[str, Any] = {}
    for item in filter(None, (match["options"] or "").split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in allowed:
            raise ConfigurationError(f"reward {name}: option {item!r}, allowed: {', '.join(allowed) or 'none'}.")
        options[key] = _value(value)
    missing = [
        p.name
        for p in inspect.signature(known[name]).parameters.values()
        if p.default is p.empty and p.name != "history" and p.name not in options
    ]
    if missing:
        raise ConfigurationError(f"reward {name}: option {missing[0]!r} is missing.")
    return float(match["factor"] or 1.0), name, options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _text_factory(spec: str) -> RewardFactory:
    from sdt_dist.rewards.text import Answer, Regex

    kind, _, argument = spec.partition(":")
    reward = Regex(argument) if kind == "regex" else Answer(argument)
    return RewardFactory(spec, "text", lambda context: reward)


def _file_factory(spec: str) -> RewardFactory:
    """A user's function of token lists or series; or, if it takes `context`, of those and the RewardContext."""
    name, _, function_name = spec.rpartition(":")
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError(f"reward: file {name!r} does not exist.")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigurationError(f"reward: {name} has no function {function_name!r}.")
    wants_context = "context" in inspect.signature(function).parameters

    def make(context: RewardContext) -> Reward:
        view: View = "tokens" if context.history is None else "series"
        return CallableReward(partial(function, context=context) if wants_context else function, view)

    return RewardFactory(spec, "any", make)
