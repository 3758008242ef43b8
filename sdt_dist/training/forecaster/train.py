"""Training and fine-tuning of forecasters: resumable exactly, reproducible by seed.

See docs/guides/backends.md#bundled-forecaster.

    python -m sdt_dist.training.forecaster.train --steps 6000 --output runs/forecaster
    python -m sdt_dist.training.forecaster.train --init bundled --data my.csv --end-row 8640 --output runs/mine

Hidden matrices are trained with Muon, embeddings and norms with AdamW; cosine schedule to zero. Step k draws its
batch from a generator seeded by (seed, k), so a resumed run sees the same data as one that never stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from transformers import LlamaForCausalLM

from sdt_dist.errors import CheckpointError, ConfigurationError, ResultsError
from sdt_dist.files import replace_file
from sdt_dist.models.forecaster.bundled import WEIGHTS_FILE, load_module
from sdt_dist.models.forecaster.spec import SPEC_FILE
from sdt_dist.models.loading import torch_device
from sdt_dist.training.forecaster.batches import CsvSource, Source, SyntheticSource, token_batch
from sdt_dist.training.forecaster.trainer import CHECKPOINT_FILE, TrainConfig, Trainer

CURVE_FILE = "curve.jsonl"


def batch_loss(
    module: torch.nn.Module, tokens: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted mean cross-entropy, in nats, of tokens [B, L] after their first."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = module(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1.0)


def train_forecaster(
    config: TrainConfig,
    *,
    max_seconds: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """Train, or go on training, to `config.steps`; returns the directory with weights, spec and curve.

    Stops early, resumably, after `max_seconds`. Raises ConfigurationError, DataError, CheckpointError or ResultsError.
    """
    directory, device, source = _prepare(config)
    torch.manual_seed(config.seed)
    module = _initial_module(config).train()
    module.to(device)  # type: ignore[arg-type]
    trainer = Trainer(config, module)
    if (directory / CHECKPOINT_FILE).exists():
        trainer.resume(directory)
        trainer.export(directory)  # a kill may have come between the checkpoint and its forecaster
    forward = cast(torch.nn.Module, torch.compile(module)) if config.compile else module
    _trim_curve(directory / CURVE_FILE, trainer.step)
    started = time.monotonic()
    losses = []
    with (directory / CURVE_FILE).open("a", encoding="utf-8") as curve:
        while trainer.step < config.steps:
            losses.append(_train_step(trainer, forward, source, device))
            if on_step is not None:
                on_step(trainer.step, losses[-1] if trainer.step % 20 == 0 else math.nan)
            stop = max_seconds is not None and time.monotonic() - started > max_seconds
            if trainer.step % 50 == 0 or trainer.step == config.steps or stop:
                mean = float(torch.stack(losses).mean())
                curve.write(
                    json.dumps(
                        {"step": trainer.step, "loss": mean, "s": time.monotonic() - started}
                    )
                    + "\n"
                )
                curve.flush()
                losses = []
            if trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps or stop:
                trainer.save(directory)
            if stop:
                break
    return directory


def _prepare(config: TrainConfig) -> tuple[Path, torch.device, Source]:
    """Everything that can be refused before a network is built: device, data, output directory."""
    directory = Path(config.output)
    device = torch_device(config.device)
    source: Source = SyntheticSource()
    if config.data is not None:
        source = CsvSource(Path(config.data), config.end_row, device)
        source.check(config.spec.max_length)
    if not (directory / CHECKPOINT_FILE).exists():
        found = [name for name in (WEIGHTS_FILE, SPEC_FILE) if (directory / name).exists()]
        if found:
            raise CheckpointError(
                f"output: {directory} holds {found[0]} but no {CHECKPOINT_FILE} to go on from; give a new directory."
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(
            f"output: {directory} cannot be a directory ({error.strerror}); give another."
        ) from error
    return directory, device, source


def _trim_curve(path: Path, step: int) -> None:
    """Drop what a stopped run wrote after its last checkpoint, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue
        if point["step"] <= step:
            kept.append(line + "\n")
    replace_file(path, lambda target: target.write_text("".join(kept), encoding="utf-8"))


def _initial_module(config: TrainConfig) -> LlamaForCausalLM:
    if config.init is None:
        return config.spec.build()
    module, spec = load_module(config.init)
    if spec != config.spec:
        raise ConfigurationError(
            f"init: {config.init!r} has spec {spec}, but {config.spec} is asked for."
        )
    return module


def _train_step(
    trainer: Trainer, forward: torch.nn.Module, source: Source, device: torch.device
) -> torch.Tensor:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in [
        ("steps", 6000),
        ("batch-size", 256),
        ("seed", 0),
        ("end-row", None),
        ("warmup", 200),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in [
        ("muon-lr", 5e-3),
        ("adam-lr", 3e-3),
        ("weight-decay", 0.05),
        ("max-seconds", None),
    ]:
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, default in [("output", None), ("device", "cpu"), ("init", None), ("data", None)]:
        parser.add_argument(f"--{name}", default=default, required=name == "output")
    parser.add_argument("--compile", action="store_true")
    arguments = vars(parser.parse_args())
    max_seconds = arguments.pop("max_seconds")

    def report(step: int, loss: float) -> None:
        if loss == loss:
            print(f"step {step}  loss {float(loss):.4f}", file=sys.stderr)

    train_forecaster(TrainConfig(**arguments), max_seconds=max_seconds, on_step=report)


if __name__ == "__main__":
    main()
