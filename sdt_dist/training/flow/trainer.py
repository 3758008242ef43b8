"""Training of the flow network from a replay buffer: seeded, resumable exactly.

See docs/concepts/flow.md.

Step k draws its batch and its inverse temperatures from a generator seeded by (seed, k). A checkpoint is one safetensors
file (weights, optimiser, replay buffer, step, options) that a rename puts in place. It must not know Ray or searches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.extras import packages_of
from sdt_dist.flow.heads import build_network
from sdt_dist.flow.network import FlowNetwork
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.training.flow.batch import Batch, Scores, make_batch, path_of
from sdt_dist.training.flow.losses import (
    bellman,
    contrastive,
    log_partition_variance,
    path,
    path_alone,
    relative_trajectory_balance,
    subtrajectory_balance,
    terminal,
    tie,
)
from sdt_dist.training.flow.options import FlowTrainOptions
from sdt_dist.training.flow.replay import ReplayBuffer
from sdt_dist.training.flow.trajectories import Trajectory
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

FORMAT = StateFormat("sdt-flow-training/1", "flow training", "start again")
Metrics = dict[str, float]
_STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


class FlowTrainer:
    """Network, optimiser, replay buffer and schedule of one run; `save` and `resume` carry all of it.

    With one torch thread on the CPU a resumed run has the losses, bit for bit, of one that never stopped. `replay` may
    grow between steps. log_dir: where TensorBoard scalars go, if anywhere. `notes` are its owner's JSON values, saved with
    it; `trained_on` is the last step's batch.
    """

    def __init__(
        self,
        network: FlowNetwork,
        replay: ReplayBuffer,
        options: FlowTrainOptions,
        *,
        log_dir: Path | None = None,
        device: str = "cpu",
    ) -> None:
        has_values = network.spec.values is not None
        if has_values and options.path == 0:
            raise ConfigurationError(
                "path: 0, allowed for tokens with values: above 0, because no other loss trains the network's trunk."
            )
        if not has_values and options.path_steps:
            raise ConfigurationError(
                f"path_steps: {options.path_steps}, allowed for tokens without values: 0; they have no spectrum to learn first."
            )
        self.network = network.to(device).train()
        self.replay = replay
        self.options = options
        self.device = torch.device(device)
        self.log_dir = log_dir
        self.step = 0
        self._writer = None
        self.notes: dict[str, Any] = {}
        self.trained_on: list[Trajectory] = []
        self.optimiser = torch.optim.AdamW(
            network.parameters(),
            lr=options.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=options.weight_decay,
        )

    def train(
        self, num_steps: int | None = None, on_step: Callable[[int, Metrics], None] | None = None
    ) -> Metrics:
        """Take `num_steps` steps (default: to `options.steps`); returns the last step's metrics.

        ConfigurationError for an empty replay buffer; CheckpointError when the loss is not finite.
        """
        metrics: Metrics = {}
        for _ in range(self.options.steps - self.step if num_steps is None else num_steps):
            metrics = self.train_step()
            if on_step is not None:
                on_step(self.step, metrics)
        self.close()
        return metrics

    def train_step(self) -> Metrics:
        """One gradient step; returns its losses, gradient norm and, after `path_steps`, mean log Z and calibration."""
        if self.step == 0:
            self._fit_scale()
        path_only = self.step < self.options.path_steps
        trajectories, batch = self._batch(path_only)
        self._set_rate()
        if path_only:
            scores = None
            losses = {"path": path_alone(path_of(self.network, batch), batch)}
        else:
            scores = Scores.of(self.network, batch)
            losses = batch_losses(scores, batch, self.options)
        weights = self.options.loss_weights
        each = torch.stack([weights[name] * value for name, value in losses.items()]).sum(0)
        loss = each.mean()
        if not torch.isfinite(loss):
            raise CheckpointError(
                f"flow training: loss {float(loss.detach())} at step {self.step}; go on from the last checkpoint with a smaller "
                "learning_rate."
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_norm)
        self.optimiser.step()
        self.replay.update(trajectories, _priorities(losses, weights, each).tolist())
        self.trained_on = trajectories
        self.step += 1
        metrics = {f"loss/{name}": float(value.detach().mean()) for name, value in losses.items()}
        metrics |= {"loss/total": float(loss.detach()), "gradient_norm": float(norm)}
        metrics |= {} if scores is None else diagnosis(scores, batch)
        self._log(metrics)
        return metrics

    def save(self, path: Path) -> None:
        """Write the whole state to one file; ResultsError when the disk refuses."""
        head, arrays = self.replay.state()
        replay = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        tensors = {
            **named("model.", self.network.state_dict()),
            **named("optimiser.", optimiser_tensors(self.optimiser)),
            **named("replay.", replay),
        }
        facts = {
            "step": self.step,
            "options": self.options.model_dump(),
            "spec": self.network.spec.to_dict(),
            "notes": self.notes,
        }
        FORMAT.write(path, tensors, {"facts": json.dumps(facts), "replay": json.dumps(head)})

    @classmethod
    def resume(
        cls,
        path: Path,
        options: FlowTrainOptions,
        *,
        log_dir: Path | None = None,
        device: str = "cpu",
    ) -> FlowTrainer:
        """The trainer that `save` wrote; CheckpointError for a damaged or foreign file or other options."""
        tensors, metadata = FORMAT.read(path)
        try:
            facts = json.loads(metadata["facts"])
            head = json.loads(metadata["replay"])
            spec = FlowSpec.of(facts["spec"], f"flow training: {path}")
            step = int(facts["step"])
            before = facts["options"]
        except (KeyError, ValueError, TypeError) as error:
            raise FORMAT.refusal(f"{path} is damaged ({error})") from error
        _check_options(before, options, path)
        arrays = {name: tensor.numpy() for name, tensor in part(tensors, "replay.").items()}
        replay = ReplayBuffer.restore(head, arrays)
        trainer = cls(build_network(spec), replay, options, log_dir=log_dir, device=device)
        trainer._load(part(tensors, "model."), part(tensors, "optimiser."), path)
        trainer.step = step
        trainer.notes = facts.get("notes", {})
        return trainer

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _batch(self, path_only: bool) -> tuple[list[Trajectory], Batch]:
        """Trajectories of some contexts, several of each so that they can be compared; without need for that, one of each."""
        options = self.options
        rng = np.random.default_rng([self.options.seed, self.step])
        sizes = (options.num_contexts, options.per_context)
        trajectories = self.replay.sample(rng, *((sizes[0] * sizes[1], 1) if path_only else sizes))
        low, high = options.inverse_temperatures
        contexts = list(dict.fromkeys(t.context for t in trajectories))
        draws = np.clip(low * (high / low) ** rng.random(len(contexts)), low, high)
        batch = make_batch(
            trajectories, dict(zip(contexts, draws.tolist(), strict=True)), self.network.spec
        )
        return trajectories, batch.to(self.device)

    def _fit_scale(self) -> None:
        """Rewards' mean, and their typical spread within a context: F is to tell samples of one context apart."""
        by_context: dict[str, list[float]] = {}
        for trajectory in self.replay.trajectories:
            by_context.setdefault(trajectory.context, []).append(trajectory.reward)
        if not by_context:
            raise ConfigurationError(
                "flow training: the replay buffer is empty; add trajectories first."
            )
        rewards = np.concatenate([np.array(found) for found in by_context.values()])
        spreads = [float(np.std(found)) for found in by_context.values() if len(found) > 1]
        spread = float(np.median(spreads)) if spreads else float(rewards.std())
        self.network.set_scale(float(rewards.mean()), max(spread, 1e-3))

    def _set_rate(self) -> None:
        """Warm-up and schedule, once for the steps by `path` alone and once for the others."""
        options = self.options
        first, last = (
            (0, options.path_steps)
            if self.step < options.path_steps
            else (options.path_steps, options.steps)
        )
        share = min(1.0, (self.step - first + 1) / max(1, options.warmup_steps))
        if options.schedule == "cosine":
            share *= 0.5 * (1 + math.cos(math.pi * min(1.0, (self.step - first) / (last - first))))
        for group in self.optimiser.param_groups:
            group["lr"] = options.learning_rate * share

    def _log(self, metrics: Metrics) -> None:
        if self.log_dir is None or self.step % self.options.log_every:
            return
        if self._writer is None:
            with packages_of("tune", "training a flow"):
                # a second to import, for those who log
                from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.log_dir), purge_step=self.step)
        for name, value in {**metrics, "replay/size": float(len(self.replay))}.items():
            self._writer.add_scalar(name, value, self.step)

    def _load(self, weights: Tensors, optimiser: Tensors, path: Path) -> None:
        """Put saved weights and optimiser states back; without states, as before the first step, the optimiser is new."""
        whole = shapes_of(weights) == shapes_of(self.network.state_dict())
        states = optimiser_shapes(self.optimiser, _STATE_KEYS) if optimiser else {}
        fits = shapes_of(optimiser) == states
        if not whole or not fits or not all_finite(weights | optimiser):
            raise FORMAT.refusal(f"{path} has damaged weights or optimiser states")
        self.network.load_state_dict(weights)
        if optimiser:
            load_optimiser(self.optimiser, optimiser, _STATE_KEYS)


def _check_options(before: dict[str, Any], options: FlowTrainOptions, path: Path) -> None:
    """CheckpointError, naming the first option that differs from those of a saved training."""
    for name, now in options.model_dump().items():
        if before.get(name) != now:
            raise CheckpointError(
                f"flow training: {path} was written with {name}={before.get(name)!r}, now {now!r}; give the same "
                "options, or another path."
            )


def _priorities(
    losses: dict[str, torch.Tensor], weights: dict[str, float], each: torch.Tensor
) -> torch.Tensor:
    """How wrong F was [B]: the losses that are 0 at V; likelihoods have no such zero and leave the draw uniform."""
    errors = [
        weights[name] * value.detach()
        for name, value in losses.items()
        if name not in ("contrastive", "path")
    ]
    return torch.stack(errors).sum(0) if errors else torch.ones_like(each)


def batch_losses(
    scores: Scores, batch: Batch, options: FlowTrainOptions
) -> dict[str, torch.Tensor]:
    """The losses [B] whose weight is above 0, by name."""
    losses = {
        "rtb": relative_trajectory_balance,
        "subtb": lambda s, b: subtrajectory_balance(s, b, options.subtb_lambda),
        "log_partition_variance": log_partition_variance,
        "bellman": bellman,
        "terminal": terminal,
        "tie": tie,
        "contrastive": contrastive,
        "path": path,
    }
    return {
        name: losses[name](scores, batch)
        for name, weight in options.loss_weights.items()
        if weight > 0
    }


def diagnosis(scores: Scores, batch: Batch) -> Metrics:
    """Mean log Z = lambda F(root); where soft values are known, F's error and correlation with them, and log Z's error."""
    with torch.no_grad():
        found = {"log_z": float((batch.tilt * scores.state[:, 0]).mean())}
        known = ~batch.soft_values.isnan()
        if known.any():
            ours = scores.state[known]
            exact = batch.soft_values[known]
            found["calibration/rms_error"] = float(((ours - exact) ** 2).mean().sqrt())
            spread = ours.std(correction=0) * exact.std(correction=0)
            covariance = ((ours - ours.mean()) * (exact - exact.mean())).mean()
            found["calibration/correlation"] = float(covariance / spread) if spread > 0 else 0.0
        at_root = known[:, 0]
        if at_root.any():
            error = (batch.tilt * (scores.state[:, 0] - batch.soft_values[:, 0]))[at_root]
            found["calibration/log_z_error"] = float((error**2).mean().sqrt())
        return found


def read_notes(path: Path) -> dict[str, Any]:
    """The owner's notes in a saved training, without its tensors; CheckpointError for a damaged or foreign file."""
    metadata = FORMAT.read_metadata(path)
    try:
        return json.loads(metadata["facts"]).get("notes", {})
    except (KeyError, ValueError, AttributeError) as error:
        raise FORMAT.refusal(f"{path} is damaged ({error})") from error
