"""Loading forecasters: the weights that ship with the package, or a directory that training saved."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sdt_dist.errors import CheckpointError
from sdt_dist.models.forecaster.spec import SPEC_FILE, ForecasterSpec

BUNDLED = Path(__file__).parent / "weights"
WEIGHTS_FILE = "model.safetensors"


def forecaster_directory(name: str) -> Path | None:
    """The directory of a forecaster called `name` ("bundled" or a path), or None when it is no forecaster's."""
    directory = BUNDLED if name == "bundled" else Path(name)
    return directory if (directory / SPEC_FILE).is_file() else None


def load_module(name: str) -> tuple[LlamaForCausalLM, ForecasterSpec]:
    """Network in float32 on the CPU, in evaluation mode, and its spec; CheckpointError for anything unusable."""
    directory = forecaster_directory(name)
    if directory is None:
        raise CheckpointError(f"model: {name!r} is no forecaster; give 'bundled' or a directory with {SPEC_FILE}.")
    spec = ForecasterSpec.load(directory)
    module = spec.build()
    try:
        weights = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model: {directory / WEIGHTS_FILE} cannot be read ({error}).") from error
    expected = {key: value.shape for key, value in module.state_dict().items() if key != "lm_head.weight"}
    found = {key: value.shape for key, value in weights.items()}
    if expected != found:
        different = sorted(set(expected.items()) ^ set(found.items()))[:2]
        raise CheckpointError(
            f"model: {directory / WEIGHTS_FILE} does not fit its spec, first differences {different}."
        )
    module.load_state_dict({key: value.to(torch.float32) for key, value in weights.items()}, strict=False)
    return module.eval(), spec
