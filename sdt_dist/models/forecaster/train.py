"""Training and fine-tuning of forecasters: resumable exactly, reproducible by seed (SPEC section 5).

    python -m sdt_dist.models.forecaster.train --steps 6000 --output runs/forecaster
    python -m sdt_dist.models.forecaster.train --init bundled --data my.csv --end-row 8640 --output runs/mine

Hidden matrices are trained with Muon, embeddings and norms with AdamW; cosine schedule to zero. Step k draws its
batch from a generator seeded by (seed, k), so a resumed run sees the same data as one that never stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.models.forecaster.batches import CsvSource, Source, SyntheticSource, token_batch
from sdt_dist.models.forecaster.spec import ForecasterSpec

WEIGHTS_FILE = "model.safetensors"
_OPTIMISER_FILE, _STATE_FILE, _CURVE_FILE = "optimiser.pt", "state.json", "curve.jsonl"


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

    def digest(self) -> str:
        """Identifies the run for resuming: everything but where and how often it writes."""
        skip = {"output", "device", "compile", "checkpoint_every"}
        fields = {key: value for key, value in asdict(self).items() if key not in skip}
        return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


class Trainer:
    """Module, optimisers and schedule of one run; `save` and `resume` carry all of it."""

    def __init__(self, config: TrainConfig, module: LlamaForCausalLM) -> None:
        self.config, self.module, self.step = config, module, 0
        hidden = [p for name, p in module.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in module.named_parameters() if p.ndim != 2 or "embed" in name]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                hidden, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
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
        """Weights (safetensors), optimiser state and step, each written beside and renamed."""
        tensors = self.module.state_dict().items()
        weights = {name: value.contiguous() for name, value in tensors if "lm_head" not in name}
        _replace(directory / WEIGHTS_FILE, lambda path: save_file(weights, path))
        states = [optimiser.state_dict() for optimiser in self.optimisers]
        _replace(directory / _OPTIMISER_FILE, lambda path: torch.save(states, path))
        state = {"step": self.step, "config": self.config.digest()}
        _replace(directory / _STATE_FILE, lambda path: path.write_text(json.dumps(state)))
        self.config.spec.save(directory)

    def resume(self, directory: Path) -> None:
        """Continue from a directory; CheckpointError when it belongs to another configuration."""
        state = json.loads((directory / _STATE_FILE).read_text())
        if state["config"] != self.config.digest():
            raise CheckpointError(f"output: {directory} holds a run of another configuration; give a new directory.")
        self.module.load_state_dict(load_file(directory / WEIGHTS_FILE, device=self.config.device), strict=False)
        states = torch.load(directory / _OPTIMISER_FILE, map_location=self.config.device, weights_only=True)
        for optimiser, saved in zip(self.optimisers, states, strict=True):
            optimiser.load_state_dict(saved)
        self.step = int(state["step"])


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)


def batch_loss(module: torch.nn.Module, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy, in nats, of tokens [B, L] after their first."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = module(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1.0)


def train_forecaster(
    config: TrainConfig,
    *,
    max_seconds: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """Train, or go on training, to `config.steps`; returns the directory with weights, spec and curve.

    Stops early, resumably, after `max_seconds`. Raises ConfigurationError, DataError or CheckpointError.
    """
    directory, device = Path(config.output), torch.device(config.device)
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    module = _initial_module(config).train()
    module.to(device)  # type: ignore[arg-type]
    trainer = Trainer(config, module)
    if (directory / _STATE_FILE).exists():
        trainer.resume(directory)
    source: Source = SyntheticSource() if config.data is None else CsvSource(Path(config.data), config.end_row, device)
    forward = cast(torch.nn.Module, torch.compile(module)) if config.compile else module
    started, losses = time.monotonic(), []
    with (directory / _CURVE_FILE).open("a") as curve:
        while trainer.step < config.steps:
            losses.append(_train_step(trainer, forward, source, device))
            if on_step is not None:
                on_step(trainer.step, losses[-1] if trainer.step % 20 == 0 else math.nan)
            stop = max_seconds is not None and time.monotonic() - started > max_seconds
            if trainer.step % 50 == 0 or trainer.step == config.steps or stop:
                mean = float(torch.stack(losses).mean())
                curve.write(json.dumps({"step": trainer.step, "loss": mean, "s": time.monotonic() - started}) + "\n")
                curve.flush()
                losses = []
            if trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps or stop:
                trainer.save(directory)
            if stop:
                break
    return directory


def _initial_module(config: TrainConfig) -> LlamaForCausalLM:
    if config.init is None:
        return config.spec.build()
    from sdt_dist.models.forecaster.bundled import load_module

    module, spec = load_module(config.init)
    if spec != config.spec:
        raise ConfigurationError(f"init: {config.init!r} has spec {spec}, but {config.spec} is asked for.")
    return module


def _train_step(trainer: Trainer, forward: torch.nn.Module, source: Source, device: torch.device) -> torch.Tensor:
    config = trainer.config
    generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + trainer.step)
    tokens, weights = token_batch(source, config.spec, config.batch_size, generator)
    trainer.set_rates()
    loss = batch_loss(forward, tokens, weights)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.module.parameters(), 1.0)
    for optimiser in trainer.optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    trainer.step += 1
    return loss.detach()


def main() -> None:
    """Command line of the training module; every field of TrainConfig but `spec` is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("steps", 6000), ("batch-size", 256), ("seed", 0), ("end-row", None), ("warmup", 200)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in [("muon-lr", 5e-3), ("adam-lr", 3e-3), ("weight-decay", 0.05), ("max-seconds", None)]:
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, default in [("output", None), ("device", "cpu"), ("init", None), ("data", None)]:
        parser.add_argument(f"--{name}", default=default, required=name == "output")
    parser.add_argument("--compile", action="store_true")
    arguments = vars(parser.parse_args())
    max_seconds = arguments.pop("max_seconds")

    def report(step: int, loss: float) -> None:
        if loss == loss:
            print(f"step {step}  loss {float(loss):.4f}", flush=True)

    train_forecaster(TrainConfig(**arguments), max_seconds=max_seconds, on_step=report)


if __name__ == "__main__":
    main()
