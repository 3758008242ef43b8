"""Loading forecasters: the weights that ship with the package, or a directory that training saved."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sdt_dist.errors import CheckpointError
from sdt_dist.models.forecaster.spec import SPEC_FILE, ForecasterSpec, forecaster_directory

WEIGHTS_FILE = "model.safetensors"


def load_module(name: str) -> tuple[LlamaForCausalLM, ForecasterSpec]:
    """Network in float32 on the CPU, in evaluation mode, and its spec; CheckpointError for anything unusable."""
    directory = forecaster_directory(name)
    if directory is None:
        raise CheckpointError(
            f"model: {name!r} is no forecaster; give 'bundled' or a directory with {SPEC_FILE}."
        )
    spec = ForecasterSpec.load(directory)
    path = directory / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model: {path} cannot be read ({error}).") from error
    check_weights(weights, spec, str(path))
    module = spec.build()
    module.load_state_dict(
        {key: value.to(torch.float32) for key, value in weights.items()}, strict=False
    )
    return module.eval(), spec


def check_weights(weights: dict[str, torch.Tensor], spec: ForecasterSpec, owner: str) -> None:
    """CheckpointError unless `weights` are all of a spec's network, in its shapes, and finite."""
    with torch.device("meta"):  # shapes only, so that a damaged spec fills no memory
        state = spec.build().state_dict()
    expected = {key: value.shape for key, value in state.items() if key != "lm_head.weight"}
    found = {key: value.shape for key, value in weights.items()}
    if expected != found:
        different = sorted(set(expected.items()) ^ set(found.items()))[:2]
        raise CheckpointError(
            f"model: {owner} does not fit its spec, first differences {different}."
        )
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"model: {owner} holds NaN or infinity in {bad[0]!r}; it is damaged, or its training diverged."
        )
