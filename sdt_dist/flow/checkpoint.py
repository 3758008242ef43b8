"""A trained flow on disk: flow.json says what it is and for which model p, model.safetensors has the weights (SPEC section 6).

Both are put in place by a rename, the weights first; flow.json names the weights' digest, so that a directory which a kill
left with the files of two versions is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdt_dist.errors import CheckpointError, ResultsError
from sdt_dist.flow.network import FlowNetwork
from sdt_dist.flow.spec import FlowSpec, allowed_of
from sdt_dist.models.card import ModelCard
from sdt_dist.models.forecaster.spec import replace_file

FORMAT = "sdt-flow/1"
INFO_FILE, WEIGHTS_FILE = "flow.json", "model.safetensors"


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
            raise CheckpointError(f"{owner}: info must have the fields {', '.join(f.name for f in fields(cls))}.")
        pairs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        info = cls(**pairs)
        for name in ("model", "reward"):
            if type(getattr(info, name)) is not str:
                raise CheckpointError(f"{owner}: {name}: {getattr(info, name)!r}, allowed: a string.")
        if type(info.version) is not int or info.version < 0:
            raise CheckpointError(f"{owner}: version: {info.version!r}, allowed: a whole number >= 0.")
        pair = info.inverse_temperatures
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(x) is float for x in pair)):
            raise CheckpointError(f"{owner}: inverse_temperatures: {pair!r}, allowed: two numbers.")
        if not 0 < pair[0] <= pair[1] < math.inf:
            raise CheckpointError(f"{owner}: inverse_temperatures: {pair!r}, allowed: 0 < lowest <= highest, finite.")
        if not isinstance(info.metrics, dict):
            raise CheckpointError(f"{owner}: metrics: {info.metrics!r}, allowed: numbers by name.")
        return info


def save_flow(directory: Path, network: FlowNetwork, info: FlowInfo) -> None:
    """Write a checkpoint directory; ResultsError when the disk refuses, CheckpointError for weights that are not finite."""
    weights = {name: value.detach().contiguous().cpu() for name, value in network.state_dict().items()}
    _check_finite(weights, str(directory))
    head = {
        "format": FORMAT,
        "spec": network.spec.to_dict(),
        "info": {**asdict(info), "inverse_temperatures": list(info.inverse_temperatures)},
        "weights": weights_digest(weights),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"output: {directory} cannot be a directory ({error.strerror}); give another.") from error
    replace_file(directory / WEIGHTS_FILE, lambda path: save_file(weights, path))
    text = json.dumps(head, indent=2) + "\n"
    replace_file(directory / INFO_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def load_flow(directory: Path) -> tuple[FlowNetwork, FlowInfo, str]:
    """(network in evaluation mode, info, weights digest) of a checkpoint; CheckpointError for anything unusable."""
    head, path = _read_head(directory / INFO_FILE), directory / WEIGHTS_FILE
    owner = f"flow: {directory / INFO_FILE}"
    spec, info = FlowSpec.of(head["spec"], owner), FlowInfo.of(head["info"], owner)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"flow: {path} cannot be read ({error}); give a whole checkpoint.") from error
    with torch.device("meta"):  # shapes only, so that a damaged spec fills no memory
        expected = {name: value.shape for name, value in FlowNetwork(spec).state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if found != expected:
        different = sorted({k for k, _ in set(found.items()) ^ set(expected.items())})[:2]
        raise CheckpointError(f"flow: {path} does not fit its spec, first differences {different}; it is foreign.")
    _check_finite(weights, str(path))
    digest = weights_digest(weights)
    if digest != head["weights"]:
        raise CheckpointError(
            f"flow: {path} has weights {digest}, {INFO_FILE} says {head['weights']!r}: the files of two versions, or "
            "damage; save the flow again."
        )
    network = FlowNetwork(spec)
    network.load_state_dict(weights)
    return network.eval(), info, digest


def check_model(spec: FlowSpec, info: FlowInfo, card: ModelCard) -> None:
    """CheckpointError unless a flow was trained for the model of this card."""
    if spec.vocab_size != card.vocab_size:
        raise CheckpointError(f"flow: vocab_size {spec.vocab_size}, model {card.name!r} has {card.vocab_size}; {_FIX}")
    if spec.allowed != allowed_of(card):
        raise CheckpointError(
            f"flow: allowed tokens {spec.allowed}, model {card.name!r} has {allowed_of(card)}; {_FIX}"
        )
    if info.model != card.identity:
        raise CheckpointError(f"flow: trained for model {info.model}, {card.name!r} is {card.identity}; {_FIX}")


_FIX = "give the model that the flow was trained for, or train a flow for this one."


def check_reward(info: FlowInfo, reward: str) -> None:
    """CheckpointError unless a flow was trained for this REWARD SPEC text."""
    if info.reward != reward:
        raise CheckpointError(
            f"flow: trained for reward {info.reward!r}, given {reward!r}; give that reward, or train a flow for this one."
        )


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """32 hex digits that name weights: their names, shapes, types and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        array = weights[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name}:{array.shape}:{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"flow: {path} cannot be read ({error}); give a directory saved by us.") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else type(head).__name__
        raise CheckpointError(f"flow: {path} has format {found!r}, allowed: {FORMAT!r}; give a directory saved by us.")
    missing = {"spec", "info", "weights"} - head.keys()
    if missing or not isinstance(head["spec"], dict):
        raise CheckpointError(f"flow: {path} lacks {sorted(missing) or 'a spec'}; give a directory saved by us.")
    return head


def _check_finite(weights: dict[str, torch.Tensor], owner: str) -> None:
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"flow: {owner} holds NaN or infinity in {bad[0]!r}; it is damaged, or its training diverged."
        )
