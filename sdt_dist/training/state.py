"""The file that a training goes on from, exactly: weights, optimiser states and what else its trainer keeps.

One safetensors file, put in place by a rename, so that a training killed at any instant leaves the last whole one. Tensors
have names that begin with what they belong to (`model.`, `optimiser.`); the rest is text in the file's metadata. It must
not know what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdt_dist.errors import CheckpointError
from sdt_dist.files import replace_file

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StateFormat:
    """A kind of training's files: the format that they name; what begins and what ends messages about them."""

    name: str
    owner: str
    remedy: str

    def write(self, path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
        """Put a state in place; ResultsError when the disk refuses."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        texts = {"format": self.name, **metadata}
        replace_file(path, lambda temporary: save_file(whole, temporary, texts))

    def read(self, path: Path) -> tuple[Tensors, dict[str, str]]:
        """(tensors on the CPU, metadata); CheckpointError for a damaged or foreign file."""
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise self.refusal(f"{path} cannot be read ({error})") from error
        self._check(metadata, path)
        return tensors, metadata

    def read_metadata(self, path: Path) -> dict[str, str]:
        """The metadata alone, without loading a tensor; errors as for `read`."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self.refusal(f"{path} cannot be read ({error})") from error
        self._check(metadata, path)
        return metadata

    def refusal(self, why: str) -> CheckpointError:
        """The error for a file that cannot be gone on from."""
        return CheckpointError(f"{self.owner}: {why}; {self.remedy}.")

    def _check(self, metadata: Mapping[str, str], path: Path) -> None:
        found = metadata.get("format")
        if found != self.name:
            raise self.refusal(f"{path} has format {found!r}, allowed: {self.name!r}")


def named(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Tensors under names that begin with a prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """The tensors whose names begin with a prefix, without it."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tensor
    return found


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def all_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether there is no NaN and no infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> Tensors:
    """An optimiser's state as `INDEX.KEY`, by the parameters' order; nothing before its first step."""
    found = {}
    for index, state in optimiser.state_dict()["state"].items():
        for key, tensor in state.items():
            found[f"{index}.{key}"] = tensor
    return found


def optimiser_shapes(optimiser: torch.optim.Optimizer, keys: Sequence[str]) -> Shapes:
    """The shapes that `optimiser_tensors` gives after a step, with these keys a parameter."""
    shapes = {}
    for index, parameter in enumerate(_parameters(optimiser)):
        for key in keys:
            shapes[f"{index}.{key}"] = () if key == "step" else tuple(parameter.shape)
    return shapes


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Tensors, keys: Sequence[str]) -> None:
    """Put back what `optimiser_tensors` gave, of these keys; rates and the like stay as they are."""
    states = {}
    for index in range(len(_parameters(optimiser))):
        states[index] = {key: tensors[f"{index}.{key}"] for key in keys}
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": states, "param_groups": groups})


def _parameters(optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
