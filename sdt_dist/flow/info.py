"""What a checkpoint's flow.json says of a flow, and for whom the flow is (docs/concepts/flow.md). It must not import torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.card import ModelCard

FORMAT = "sdt-flow/1"
INFO_FILE = "flow.json"
WEIGHTS_FILE = "model.safetensors"
_FIX = "give the model that the flow was trained for, or train a flow for this one."


@dataclass(frozen=True, slots=True)
class FlowInfo:
    """What a flow is for: the model (identity of its card), the reward (REWARD SPEC text), the inverse temperatures
    [lowest, highest] it was trained at, its version number (>= 0) and the training's metrics."""

    model: str
    reward: str
    inverse_temperatures: tuple[float, float]
    version: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Any, owner: str) -> FlowInfo:
        """The info in JSON values; CheckpointError, naming the field, when it is none."""
        if not isinstance(values, dict) or sorted(values) != sorted(f.name for f in fields(cls)):
            raise CheckpointError(
                f"{owner}: info must have the fields {', '.join(f.name for f in fields(cls))}."
            )
        pairs: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        info = cls(**pairs)
        for name in ("model", "reward"):
            if type(getattr(info, name)) is not str:
                raise CheckpointError(
                    f"{owner}: {name}: {getattr(info, name)!r}, allowed: a string."
                )
        if type(info.version) is not int or info.version < 0:
            raise CheckpointError(
                f"{owner}: version: {info.version!r}, allowed: a whole number >= 0."
            )
        pair = info.inverse_temperatures
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(x) is float for x in pair)):
            raise CheckpointError(f"{owner}: inverse_temperatures: {pair!r}, allowed: two numbers.")
        if not 0 < pair[0] <= pair[1] < math.inf:
            raise CheckpointError(
                f"{owner}: inverse_temperatures: {pair!r}, allowed: 0 < lowest <= highest, finite."
            )
        if not isinstance(info.metrics, dict):
            raise CheckpointError(f"{owner}: metrics: {info.metrics!r}, allowed: numbers by name.")
        return info


@dataclass(frozen=True, slots=True)
class FlowHead:
    """flow.json: the network's spec, what the flow is for, and the digest of its weights."""

    spec: FlowSpec
    info: FlowInfo
    weights: str

    @classmethod
    def of(cls, text: str, source: str) -> FlowHead:
        """The head in the text of `source`; CheckpointError when it is none."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"flow: {source} cannot be read ({error}); give a directory saved by us."
            ) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(
                f"flow: {source} has format {found!r}, allowed: {FORMAT!r}; give a directory saved by us."
            )
        missing = {"spec", "info", "weights"} - values.keys()
        if missing or not isinstance(values["spec"], dict):
            raise CheckpointError(
                f"flow: {source} lacks {sorted(missing) or 'a spec'}; give a directory saved by us."
            )
        owner = f"flow: {source}"
        return cls(
            FlowSpec.of(values["spec"], owner),
            FlowInfo.of(values["info"], owner),
            values["weights"],
        )

    def to_json(self) -> str:
        """The text of flow.json."""
        info = {**asdict(self.info), "inverse_temperatures": list(self.info.inverse_temperatures)}
        values = {
            "format": FORMAT,
            "spec": self.spec.to_dict(),
            "info": info,
            "weights": self.weights,
        }
        return json.dumps(values, indent=2) + "\n"

    @property
    def identity(self) -> str:
        """32 hex digits that name this very version, metrics and version number aside."""
        facts = [
            self.spec.to_dict(),
            self.info.model,
            self.info.reward,
            list(self.info.inverse_temperatures),
        ]
        named = json.dumps([*facts, self.weights], sort_keys=True)
        return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()

    def check_use(self, reward: str, inverse_temperature: float, max_new_tokens: int) -> None:
        """CheckpointError or ConfigurationError unless a flow is for this reward, lambda and length."""
        check_reward(self.info, reward)
        check_inverse_temperature(self.info, inverse_temperature)
        if max_new_tokens > self.spec.max_new_tokens:
            raise ConfigurationError(
                f"flow: trained for up to {self.spec.max_new_tokens} new tokens (a forecast's horizon), asked for "
                f"{max_new_tokens}; ask for fewer, or train a flow for so many."
            )
        if self.spec.values is not None and max_new_tokens != self.spec.max_new_tokens:
            raise ConfigurationError(
                f"flow: it knows the spectra of samples of {self.spec.max_new_tokens} values (the horizon), asked for "
                f"{max_new_tokens}; ask for as many, or train a flow for this horizon."
            )


def check_model(spec: FlowSpec, info: FlowInfo, card: ModelCard) -> None:
    """CheckpointError unless a flow was trained for the model of this card."""
    if spec.vocab_size != card.vocab_size:
        raise CheckpointError(
            f"flow: vocab_size {spec.vocab_size}, model {card.name!r} has {card.vocab_size}; {_FIX}"
        )
    if spec.allowed != card.allowed:
        raise CheckpointError(
            f"flow: allowed tokens {spec.allowed}, model {card.name!r} has {card.allowed}; {_FIX}"
        )
    if info.model != card.identity:
        raise CheckpointError(
            f"flow: trained for model {info.model}, {card.name!r} is {card.identity}; {_FIX}"
        )


def check_reward(info: FlowInfo, reward: str) -> None:
    """CheckpointError unless a flow was trained for this REWARD SPEC text."""
    if info.reward != reward:
        raise CheckpointError(
            f"flow: trained for reward {info.reward!r}, given {reward!r}; give that reward, or train a flow for this one."
        )


def check_inverse_temperature(info: FlowInfo, inverse_temperature: float) -> None:
    """ConfigurationError unless a flow was trained at this inverse temperature."""
    low, high = info.inverse_temperatures
    if not low <= inverse_temperature <= high:
        raise ConfigurationError(
            f"inverse_temperature: {inverse_temperature}, the flow was trained for {low} to {high}; choose one there "
            "or train a flow for it."
        )


def arrays_digest(weights: Mapping[str, np.ndarray]) -> str:
    """32 hex digits that name weights: their names, shapes, types and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name]).reshape(weights[name].shape)
        digest.update(f"{name}:{array.shape}:{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
