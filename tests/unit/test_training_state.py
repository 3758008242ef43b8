"""Exact training states: those that an earlier tree wrote go on as they did there, others are refused in words.

`golden/files/training/` was written by the trainers of version 0.1.0 before they shared a format: a flow for tokens without
values, one for tokens with values whose owner is a fleet's learner, and a forecaster, each with the losses that followed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdt_dist.errors import CheckpointError
from sdt_dist.flow.checkpoint import FlowInfo
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.forecaster.spec import ForecasterSpec
from sdt_dist.training.flow.learner import LOSSES_FILE, STATE_FILE, Learner
from sdt_dist.training.flow.loss_log import read_losses
from sdt_dist.training.flow.options import FlowTrainOptions, LearnerOptions
from sdt_dist.training.flow.progress import Brought, Intake, Progress, Tally
from sdt_dist.training.flow.trainer import read_notes
from sdt_dist.training.forecaster.train import CURVE_FILE, train_forecaster
from sdt_dist.training.forecaster.trainer import CHECKPOINT_FILE, TrainConfig
from sdt_dist.training.state import StateFormat, load_optimiser, optimiser_shapes, optimiser_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
OLD = Path(__file__).parents[1] / "golden" / "files" / "training"
CLOSE = {"rel": 1e-3, "abs": 1e-4}  # other processors round otherwise
TRAINING: dict[str, Any] = {
    "steps": 6,
    "lowest_inverse_temperature": 2,
    "highest_inverse_temperature": 5,
    "log_every": 2,
    "num_contexts": 3,
}
FLOWS = {"tokens": (None, {"path": 0.0}), "values": ((-1.0, 1.0), {"path_steps": 1})}
PROGRESS = {
    "tokens": Progress([[Brought(7, 7)]], [{"flow": 0.5, "prior": 1.5}]),
    "values": Progress(
        intake=Intake("token", [3, 4], 7, 2, 1, {"snis": Tally(7, 2, 7, 1.5, 3.0, 1)})
    ),
}
SMALL = ForecasterSpec(
    context_length=64,
    max_horizon=16,
    vocab_size=18,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    head_dim=8,
)
FORMAT = StateFormat("test/1", "test", "start again")


def followed(kind: str) -> list[dict[str, float]]:
    return json.loads((OLD / "losses.json").read_text())[kind]


def opened(directory: Path, kind: str) -> Learner:
    values, losses = FLOWS[kind]
    spec = FlowSpec(5, (0, 5), 4, values=values, context_length=3, hidden_size=8, key_size=4)
    options = LearnerOptions(save_every=3, calibrate_every=2, replay_capacity=30)
    training = FlowTrainOptions.parse(TRAINING | losses)
    info = FlowInfo("model", "toy", (1.0, 1.0))
    return Learner.open(
        directory, spec, info, training, options, configuration={"seed": 0}, resume=True
    )


@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow_training_of_before_goes_on_as_it_did(kind: str, tmp_path: Path) -> None:
    shutil.copy(OLD / f"{kind}.safetensors", tmp_path / STATE_FILE)
    learner = opened(tmp_path, kind)
    assert (learner.step, learner.version, len(learner.replay)) == (3, 1, 7)
    assert learner.progress == PROGRESS[kind]
    learner.train(3)
    learner.close()
    found = read_losses(tmp_path / LOSSES_FILE)
    wanted = followed(kind)
    assert len(found) == len(wanted) == 3
    for line, expected in zip(found, wanted, strict=True):
        assert line == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("kind", FLOWS)
def test_progress_is_the_json_that_it_was(kind: str) -> None:
    facts = read_notes(OLD / f"{kind}.safetensors")["facts"]
    assert PROGRESS[kind].to_json() == facts
    assert Progress.of(facts, "file") == PROGRESS[kind]
    with pytest.raises(CheckpointError, match="file: no progress of a training"):
        Progress.of(facts | {"rounds": [[{"trajectory": 7}]]}, "file")


def test_what_a_round_brought_says_only_what_was_counted() -> None:
    assert Brought(4, 3).to_json() == {"trajectories": 4, "new": 3}
    live = Tally(6, 2, 5, 3.0, 4.0, 1).brought("snis").to_json()
    assert live == {
        "method": "snis",
        "trajectories": 6,
        "searches": 2,
        "reward": 1.5,
        "ess": 4.0,
        "new": 5,
    }
    none = Brought(0, method="dts", failed=2).to_json()
    assert none["failed"] == 2 and none["reward"] is None and none["ess"] is None


def forecaster_run(directory: Path) -> TrainConfig:
    return TrainConfig(
        str(directory), steps=4, batch_size=2, warmup=1, spec=SMALL, checkpoint_every=2
    )


def test_a_forecaster_training_of_before_goes_on_as_it_did(tmp_path: Path) -> None:
    shutil.copy(OLD / "forecaster.safetensors", tmp_path / CHECKPOINT_FILE)
    train_forecaster(forecaster_run(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / CURVE_FILE).read_text().splitlines()]
    found = [{"step": line["step"], "loss": line["loss"]} for line in lines]
    assert found == [pytest.approx(line, rel=1e-2) for line in followed("forecaster")]


def test_a_state_of_the_other_trainer_is_refused(tmp_path: Path) -> None:
    shutil.copy(OLD / "tokens.safetensors", tmp_path / CHECKPOINT_FILE)
    with pytest.raises(CheckpointError, match="has format 'sdt-flow-training/1', allowed"):
        train_forecaster(forecaster_run(tmp_path))
    shutil.copy(OLD / "forecaster.safetensors", tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match="has format 'sdt-forecaster-training/1', allowed"):
        read_notes(tmp_path / STATE_FILE)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "state"
    tensors = {"model.a": torch.arange(3.0), "optimiser.0.step": torch.tensor(2.0)}
    FORMAT.write(path, tensors, {"note": "x"})
    found, metadata = FORMAT.read(path)
    assert metadata == FORMAT.read_metadata(path) == {"format": "test/1", "note": "x"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    path.write_bytes(path.read_bytes()[:-1])
    for read in (FORMAT.read, FORMAT.read_metadata):
        with pytest.raises(CheckpointError, match=r"test: .* cannot be read .*; start again"):
            read(path)


def test_an_optimiser_goes_on_from_its_tensors() -> None:
    def stepped(module: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        module(torch.ones(1, 3)).sum().backward()
        optimiser.step()

    keys = ("step", "exp_avg", "exp_avg_sq")
    torch.manual_seed(0)
    one = torch.nn.Linear(3, 2)
    first = torch.optim.AdamW(one.parameters())
    assert optimiser_tensors(first) == {}
    stepped(one, first)
    saved = {name: tensor.clone() for name, tensor in optimiser_tensors(first).items()}
    assert {name: tuple(t.shape) for name, t in saved.items()} == optimiser_shapes(first, keys)
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    second = torch.optim.AdamW(other.parameters())
    load_optimiser(second, saved, keys)
    stepped(one, first)
    stepped(other, second)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
