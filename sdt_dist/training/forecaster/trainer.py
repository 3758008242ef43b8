"""What a training run is, and its state: weights, optimisers and schedule, saved and resumed exactly.

See docs/guides/backends.md#bundled-forecaster.

A checkpoint is one safetensors file (weights, optimiser states, step, digest of the settings) that a rename puts in
place: a run killed at any instant leaves the last whole one. The forecaster to load is written beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from sdt_dist.errors import ConfigurationError
from sdt_dist.files import replace_file
from sdt_dist.models.forecaster.bundled import WEIGHTS_FILE, check_weights
from sdt_dist.models.forecaster.spec import ForecasterSpec
from sdt_dist.training.state import (
    StateFormat,
    Tensors,
    all_finite,
    load_optimiser,
    named,
    optimiser_shapes,
    optimiser_tensors,
    part,
    shapes_of,
)

CHECKPOINT_FILE = "checkpoint.safetensors"
_FORMAT = StateFormat("sdt-forecaster-training/1", "output", "give a new directory")
_STATE_KEYS = (("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq"))  # of Muon and of AdamW


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run. `init` names a forecaster to start from (None: random); `data` a CSV (None: synthetic)."""

    output: str
    steps: int = 6000
    batch_size: int = 256
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 200
    seed: int = 0
    device: str = "cpu"
    compile: bool = False
    checkpoint_every: int = 500
    init: str | None = None
    data: str | None = None
    end_row: int | None = None
    spec: ForecasterSpec = field(default_factory=ForecasterSpec)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}: {getattr(self, name)}, must be >= 1.")
        for name in ("muon_lr", "adam_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name}: {getattr(self, name)}, must be finite and >= 0.")

    def digest(self) -> str:
        """Identifies the run for resuming: everything but where and how often it writes."""
        skip = {"output", "device", "compile", "checkpoint_every"}
        fields = {key: value for key, value in asdict(self).items() if key not in skip}
        return hashlib.blake2b(
            json.dumps(fields, sort_keys=True).encode(), digest_size=8
        ).hexdigest()


class Trainer:
    """Module, optimisers and schedule of one run; `save` and `resume` carry all of it."""

    def __init__(self, config: TrainConfig, module: LlamaForCausalLM) -> None:
        self.config = config
        self.module = module
        self.step = 0
        hidden = [p for name, p in module.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in module.named_parameters() if p.ndim != 2 or "embed" in name]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                hidden,
                lr=config.muon_lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._peaks = [config.muon_lr, config.adam_lr]

    def set_rates(self) -> None:
        """Linear warm-up, then a cosine to zero."""
        config = self.config
        warm = min(1.0, (self.step + 1) / max(1, min(config.warmup, config.steps // 10)))
        share = warm * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        for optimiser, peak in zip(self.optimisers, self._peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * share

    def save(self, directory: Path) -> None:
        """The checkpoint, then the forecaster as `load_module` reads it; ResultsError when the disk refuses."""
        tensors = named("model.", self._weights())
        for i, optimiser in enumerate(self.optimisers):
            tensors |= named(f"optimiser.{i}.", optimiser_tensors(optimiser))
        metadata = {"step": str(self.step), "config": self.config.digest()}
        _FORMAT.write(directory / CHECKPOINT_FILE, tensors, metadata)
        self.export(directory)

    def export(self, directory: Path) -> None:
        """The forecaster as it is now: weights and spec."""
        weights = {name: value.contiguous() for name, value in self._weights().items()}
        replace_file(directory / WEIGHTS_FILE, lambda path: save_file(weights, path))
        self.config.spec.save(directory)

    def resume(self, directory: Path) -> None:
        """Continue from a directory's checkpoint; CheckpointError when it is damaged or of another configuration."""
        path = directory / CHECKPOINT_FILE
        tensors, metadata = _FORMAT.read(path)
        if not metadata.get("step", "").isdecimal():
            raise _FORMAT.refusal(f"{path} has no step")
        if metadata.get("config") != self.config.digest():
            raise _FORMAT.refusal(f"{directory} holds a run of another configuration")
        weights = part(tensors, "model.")
        check_weights(weights, self.config.spec, str(path))
        self.module.load_state_dict(weights, strict=False)
        self._load_optimisers(part(tensors, "optimiser."), path)
        self.step = int(metadata["step"])

    def _weights(self) -> dict[str, torch.Tensor]:
        return {
            name: value for name, value in self.module.state_dict().items() if "lm_head" not in name
        }

    def _load_optimisers(self, tensors: Tensors, path: Path) -> None:
        """Put saved states into the optimisers, whose rates the schedule sets; CheckpointError unless all are there."""
        expected = {}
        for i, (optimiser, keys) in enumerate(zip(self.optimisers, _STATE_KEYS, strict=True)):
            for name, shape in optimiser_shapes(optimiser, keys).items():
                expected[f"{i}.{name}"] = shape
        if shapes_of(tensors) != expected or not all_finite(tensors):
            raise _FORMAT.refusal(f"{path} has damaged optimiser states")
        for i, (optimiser, keys) in enumerate(zip(self.optimisers, _STATE_KEYS, strict=True)):
            load_optimiser(optimiser, part(tensors, f"{i}."), keys)
