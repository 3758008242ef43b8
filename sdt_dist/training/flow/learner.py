"""The flow's learner: a directory with exact training state, recorded losses and published versions.

See docs/concepts/flow.md.

    training.safetensors   weights, optimiser, replay buffer, step, version and the owner's progress, in one file
    losses.jsonl           one line a step, cut back to the saved step when a training goes on
    tensorboard/           the same and more, as scalars
    versions/NNNNNN/       published flows, each put in place whole by a rename

The state is saved before its version appears, and a version is on disk before `publish` returns, so a number never names
two sets of weights. It must not know Ray, searches or the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdt_dist.errors import CheckpointError, ConfigurationError, ResultsError
from sdt_dist.extras import packages_of
from sdt_dist.flow.checkpoint import FlowInfo, save_flow
from sdt_dist.flow.flow import Flow
from sdt_dist.flow.heads import build_network
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.training.flow.batch import Scores, check_trajectory, make_batch
from sdt_dist.training.flow.held_out import divergences
from sdt_dist.training.flow.loss_log import LossLog
from sdt_dist.training.flow.options import FlowTrainOptions, LearnerOptions
from sdt_dist.training.flow.progress import Progress
from sdt_dist.training.flow.replay import ReplayBuffer
from sdt_dist.training.flow.trainer import FlowTrainer, Metrics, diagnosis, read_notes
from sdt_dist.training.flow.trajectories import Trajectory
from sdt_dist.training.flow.versions import latest_version, place_version

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STATE_FILE = "training.safetensors"
LOSSES_FILE = "losses.jsonl"
TENSORBOARD = "tensorboard"
OnStep = Callable[[int, Metrics], None]
_CALIBRATED_ON = 64  # trajectories
_MISSING = object()


def check_directory(directory: Path, configuration: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether a directory holds a training to go on with; nothing is loaded.

    ResultsError where it holds one and `resume` is not given, or where that training's configuration differs in one of the
    given settings; CheckpointError for a damaged state, or a directory with other things in it.
    """
    state = directory / STATE_FILE
    if directory.exists() and not directory.is_dir():
        raise ResultsError(f"output: {directory} is no directory; give another.")
    if not state.exists():
        found = sorted(path.name for path in directory.glob("[!.]*") if path.suffix != ".tmp")
        if found:
            raise CheckpointError(
                f"output: {directory} holds {found[0]!r} but no {STATE_FILE} to go on from; give a new directory."
            )
        return False
    if not resume:
        raise ResultsError(
            f"output: {directory} already holds a training; add --resume, or give another directory."
        )
    before = read_notes(state).get("configuration", {})
    for name, value in configuration.items():
        if before.get(name, _MISSING) != value:
            raise ResultsError(
                f"output: {directory} holds the training of another configuration ({name}: {before.get(name)!r}, now "
                f"{value!r}); give another directory."
            )
    return True


class Learner:
    """Trains one flow on the trajectories that it is given, and publishes its versions. Make one with `open`.

    `progress` is its owner's record: it is saved with the training's state, never apart from it; `saved_progress` is that
    of the last saved state. With one torch
    thread on the CPU, what follows a saved state has the same losses, bit for bit, whether or not it was killed there.
    """

    def __init__(
        self, directory: Path, trainer: FlowTrainer, info: FlowInfo, options: LearnerOptions
    ) -> None:
        self.directory = directory
        self.trainer = trainer
        self.info = info
        self.options = options
        notes = trainer.notes
        self.version, self.dropped, self.expired = (
            int(notes[name]) for name in ("version", "dropped", "expired")
        )
        self.progress = Progress.of(notes["facts"], str(directory / STATE_FILE))
        self.saved_progress = deepcopy(self.progress)
        self.metrics: Metrics = notes["metrics"]
        self._losses = LossLog(directory / LOSSES_FILE, trainer.step)
        self._writer: SummaryWriter | None = None
        self._opened_at = trainer.step
        self._clock = (trainer.step, time.monotonic())

    @classmethod
    def open(
        cls,
        directory: Path,
        spec: FlowSpec,
        info: FlowInfo,
        training: FlowTrainOptions,
        options: LearnerOptions | None = None,
        *,
        configuration: Mapping[str, Any] | None = None,
        resume: bool = False,
        device: str = "cpu",
    ) -> Learner:
        """A learner on a new or empty directory or, with `resume`, on one that it goes on with from its last saved state.

        info: the model and reward of the flow; its inverse temperatures are the training's. configuration: further settings
        (JSON values) that make two trainings the same. Errors as for `check_directory`, and ResultsError when the disk refuses.
        """
        options = options or LearnerOptions.model_validate({})
        info = replace(info, inverse_temperatures=training.inverse_temperatures)
        same = {
            **(configuration or {}), "model_identity": info.model, "reward": info.reward, "spec": spec.to_dict(),
            "learner": options.model_dump(),
        }  # fmt: skip
        if check_directory(directory, same, resume=resume):
            trainer = FlowTrainer.resume(directory / STATE_FILE, training, device=device)
            learner = cls(directory, trainer, info, options)
            learner._complete_version()
            return learner
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(
                f"output: {directory} cannot be a directory ({error.strerror}); give another."
            ) from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            network = build_network(spec)
        trainer = FlowTrainer(
            network,
            ReplayBuffer(options.replay_capacity, options.priority_exponent),
            training,
            device=device,
        )
        trainer.notes = {
            "configuration": same, "version": 0, "dropped": 0, "expired": 0, "facts": {}, "metrics": {},
        }  # fmt: skip
        learner = cls(directory, trainer, info, options)
        learner.save()
        return learner

    @property
    def step(self) -> int:
        """Gradient steps taken."""
        return self.trainer.step

    @property
    def replay(self) -> ReplayBuffer:
        return self.trainer.replay

    @property
    def staleness(self) -> tuple[float, int]:
        """(mean, largest) age of what the last step was trained on, in versions."""
        ages = [self._age(t) for t in self.trainer.trained_on] or [0]
        return float(np.mean(ages)), max(ages)

    def add(self, trajectories: Sequence[Trajectory], version: int | None = None) -> int:
        """Keep trajectories that were drawn with a version of the flow (None: from p alone); returns how many are new.

        Those older than `max_staleness` versions are dropped and counted. DataError for what the network cannot take,
        ConfigurationError for a version that was never published.
        """
        if version is not None and not 0 <= version <= self.version:
            raise ConfigurationError(
                f"learner: version {version}, allowed: 0 to {self.version}, the last published."
            )
        for trajectory in trajectories:
            check_trajectory(trajectory, self.trainer.network.spec)
        marked = [replace(t, source={**t.source, "version": version}) for t in trajectories]
        fresh = [t for t in marked if self._age(t) <= self.options.max_staleness]
        self.dropped += len(marked) - len(fresh)
        return self.replay.add(fresh)

    def train(self, num_steps: int, on_step: OnStep | None = None) -> Metrics:
        """Take steps, record them and save now and then; returns the last step's metrics.

        ConfigurationError while there is nothing to train on; CheckpointError when the loss is not finite.
        """
        for _ in range(num_steps):
            self.metrics = self.trainer.train_step()
            if self.step % self.options.calibrate_every == 0:
                self.metrics |= self.calibrate()
            self._losses.append({"step": self.step, **self.metrics})
            self._log()
            if on_step is not None:
                on_step(self.step, self.metrics)
            if self.step % self.options.save_every == 0:
                self.save()
        return self.metrics

    def publish(self) -> tuple[int, Path]:
        """(number, directory) of the flow as it is now, which is on disk when this returns.

        Trajectories that this makes too old leave the replay buffer.
        """
        self.version += 1
        self.expired += self.replay.drop(lambda t: self._age(t) > self.options.max_staleness)
        self.save()
        return self.version, self._write_version()

    def save(self) -> None:
        """Put the whole state on disk; a kill loses what came after. ResultsError when the disk refuses."""
        self._losses.sync()
        self.trainer.notes |= {
            "version": self.version,
            "dropped": self.dropped,
            "expired": self.expired,
            "facts": self.progress.to_json(),
            "metrics": self.metrics,
        }
        self.trainer.save(self.directory / STATE_FILE)
        self.saved_progress = deepcopy(self.progress)

    def flow(self) -> Flow | None:
        """The last published flow, as searches use it; None before the first."""
        latest = latest_version(self.directory)
        return None if latest is None else Flow.load(latest[1])

    def export(self, directory: Path) -> None:
        """Write the flow as it is now as a checkpoint directory."""
        save_flow(directory, self.trainer.network, self._info())

    def calibrate(self) -> Metrics:
        """F against the soft values that some of the buffer's trajectories carry, at the lambdas of those.

        Root mean square error and correlation over all their states, in units of the reward, and the error of log Z in
        nats; nothing where no trajectory carries values within the trained range.
        """
        low, high = self.trainer.options.inverse_temperatures
        known = [
            t
            for t in self.replay.trajectories
            if t.soft_values_at is not None and low <= t.soft_values_at <= high
        ]
        if not known:
            return {}
        rng = np.random.default_rng([self.trainer.options.seed, self.step, 1])
        chosen = [known[i] for i in rng.permutation(len(known))[:_CALIBRATED_ON]]
        tilts = {t.context: float(t.soft_values_at or 1.0) for t in chosen}
        batch = make_batch(chosen, tilts, self.trainer.network.spec).to(self.trainer.device)
        with torch.no_grad():
            found = diagnosis(Scores.of(self.trainer.network, batch), batch)
        return {name.replace("/", "/tree_"): value for name, value in found.items() if "/" in name}

    def divergences(self, trajectories: Sequence[Trajectory]) -> Metrics:
        """KL(pi*||P_F) and KL(pi*||p) in nats on draws from p, at the highest trained lambda (`held_out.divergences`)."""
        return divergences(
            self.trainer.network, trajectories, self.trainer.options.highest_inverse_temperature
        )

    def close(self) -> None:
        """Close the files; the state stays as it was last saved."""
        self._losses.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _age(self, trajectory: Trajectory) -> int:
        version = trajectory.source["version"]
        return 0 if version is None else self.version - version

    def _info(self) -> FlowInfo:
        return replace(self.info, version=self.version, metrics=self.metrics)

    def _write_version(self) -> Path:
        return place_version(self.directory, self.version, self.export, self.options.keep_versions)

    def _complete_version(self) -> None:
        """Write the version that the state announces, where a kill came between the two."""
        latest = latest_version(self.directory)
        if self.version and (latest is None or latest[0] < self.version):
            self._write_version()

    def _log(self) -> None:
        """TensorBoard scalars: the step's metrics, what it was trained on, and how fast."""
        if self.step % self.trainer.options.log_every and self.step % self.options.calibrate_every:
            return
        writer = self._writer = self._writer or self._open_writer()
        (step, moment), self._clock = self._clock, (self.step, time.monotonic())
        rate = (self.step - step) / max(self._clock[1] - moment, 1e-9)
        mean, largest = self.staleness
        scalars = {
            "staleness/mean": mean,
            "staleness/max": float(largest),
            "replay/size": float(len(self.replay)),
            "replay/added": float(self.replay.added),
            "replay/evicted": float(self.replay.evicted),
            "replay/dropped": float(self.dropped),
            "replay/expired": float(self.expired),
            "throughput/steps_per_s": rate,
            "throughput/trajectories_per_s": rate * len(self.trainer.trained_on),
        }
        for name, value in {**self.metrics, **scalars}.items():
            writer.add_scalar(name, value, self.step)

    def _open_writer(self) -> SummaryWriter:
        """Points after the step that this learner was opened at are a killed one's, and go."""
        with packages_of("tune", "training a flow"):
            from torch.utils.tensorboard import SummaryWriter  # a second to import

        return SummaryWriter(str(self.directory / TENSORBOARD), purge_step=self._opened_at + 1)
