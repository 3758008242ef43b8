"""A trained flow on disk: flow.json says what it is and for which model p, model.safetensors has the weights.

See docs/concepts/flow.md.

Both are put in place by a rename, the weights first; flow.json names the weights' digest, so that a directory which a kill
left with the files of two versions is refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load, save_file

from sdt_dist.errors import CheckpointError, ResultsError
from sdt_dist.files import replace_file
from sdt_dist.flow.files import FlowFiles
from sdt_dist.flow.heads import build_network
from sdt_dist.flow.info import (
    FORMAT,
    INFO_FILE,
    WEIGHTS_FILE,
    FlowHead,
    FlowInfo,
    arrays_digest,
    check_model,
    check_reward,
)
from sdt_dist.flow.network import FlowNetwork

__all__ = [
    "FORMAT",
    "INFO_FILE",
    "WEIGHTS_FILE",
    "FlowInfo",
    "check_model",
    "check_reward",
    "load_flow",
    "network_of",
    "save_flow",
    "weights_digest",
]


def save_flow(directory: Path, network: FlowNetwork, info: FlowInfo) -> None:
    """Write a checkpoint directory; ResultsError when the disk refuses, CheckpointError for weights that are not finite."""
    weights = {
        name: value.detach().contiguous().cpu() for name, value in network.state_dict().items()
    }
    _check_finite(weights, str(directory))
    text = FlowHead(network.spec, info, weights_digest(weights)).to_json()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(
            f"output: {directory} cannot be a directory ({error.strerror}); give another."
        ) from error
    replace_file(directory / WEIGHTS_FILE, lambda path: save_file(weights, path))
    replace_file(directory / INFO_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def load_flow(directory: Path) -> tuple[FlowNetwork, FlowInfo, str]:
    """(network in evaluation mode, info, weights digest) of a checkpoint; CheckpointError for anything unusable."""
    return network_of(FlowFiles.read(directory))


def network_of(files: FlowFiles) -> tuple[FlowNetwork, FlowInfo, str]:
    """(network in evaluation mode, info, weights digest) of a checkpoint's files; CheckpointError for anything unusable."""
    files.check()
    head = files.head
    weights = load(files.weights)
    with torch.device("meta"):  # shapes only, so that a damaged spec fills no memory
        expected = {
            name: value.shape for name, value in build_network(head.spec).state_dict().items()
        }
    found = {name: value.shape for name, value in weights.items()}
    if found != expected:
        different = sorted({k for k, _ in set(found.items()) ^ set(expected.items())})[:2]
        raise CheckpointError(
            f"flow: {files.source}/{WEIGHTS_FILE} does not fit its spec, first differences {different}; it is foreign."
        )
    network = build_network(head.spec)
    network.load_state_dict(weights)
    return network.eval(), head.info, head.weights


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """32 hex digits that name weights: their names, shapes, types and bits."""
    return arrays_digest({name: value.detach().cpu().numpy() for name, value in weights.items()})


def _check_finite(weights: dict[str, torch.Tensor], owner: str) -> None:
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"flow: {owner} holds NaN or infinity in {bad[0]!r}; it is damaged, or its training diverged."
        )
