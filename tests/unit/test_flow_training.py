"""Training state: exact resuming, options, and what checkpoints refuse (docs/concepts/flow.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdt_dist.errors import CheckpointError, ConfigurationError, ResultsError
from sdt_dist.flow.checkpoint import INFO_FILE, WEIGHTS_FILE, FlowInfo, save_flow
from sdt_dist.flow.flow import Flow
from sdt_dist.flow.heads import build_network
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.card import card_of
from sdt_dist.protocols import Root
from sdt_dist.training.flow.options import FlowTrainOptions
from sdt_dist.training.flow.replay import ReplayBuffer
from sdt_dist.training.flow.trainer import FlowTrainer
from tests.flow_helpers import toy_trajectory
from tests.search_helpers import toy

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = FlowSpec(5, (0, 5), 4, values=(-1.0, 1.0), context_length=3, hidden_size=16, key_size=8)
LOG_ROWS = np.log(np.full((2, 5), 0.2))
ALL = {"rtb": 1, "subtb": 0.5, "log_partition_variance": 1, "bellman": 1, "terminal": 1, "tie": 1}
OPTIONS = FlowTrainOptions.parse(
    {
        "steps": 12,
        "lowest_inverse_temperature": 2,
        "highest_inverse_temperature": 5,
        "log_every": 4,
        **ALL,
    }
)


def new_trainer(options: FlowTrainOptions = OPTIONS, log_dir: Path | None = None) -> FlowTrainer:
    torch.manual_seed(0)
    replay = ReplayBuffer(50)
    for prompt in range(6):
        replay.add(
            [
                toy_trajectory(toy("A"), toy("A").sequence(i + prompt), (prompt % 5,))
                for i in range(0, 600, 60)
            ]
        )
    return FlowTrainer(build_network(SPEC), replay, options, log_dir=log_dir)


def test_resuming_equals_never_having_stopped(tmp_path: Path) -> None:
    whole = new_trainer()
    curve = []
    whole.train(on_step=lambda step, metrics: curve.append((step, metrics)))
    stopped = new_trainer()
    first = []
    stopped.train(5, on_step=lambda step, metrics: first.append((step, metrics)))
    stopped.save(tmp_path / "training.safetensors")
    resumed = FlowTrainer.resume(tmp_path / "training.safetensors", OPTIONS)
    resumed.train(on_step=lambda step, metrics: first.append((step, metrics)))
    assert (
        first == curve
        and len(curve) == 12
        and {f"loss/{name}" for name in ALL} < curve[0][1].keys()
    )
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    new_trainer().save(tmp_path / "t")
    assert FlowTrainer.resume(tmp_path / "t", OPTIONS).train(2) == new_trainer().train(2)


def test_damaged_and_foreign_training_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    trainer = new_trainer()
    trainer.train(2)
    trainer.save(path)
    with pytest.raises(CheckpointError, match="seed=0, now 1"):
        FlowTrainer.resume(path, OPTIONS.model_copy(update={"seed": 1}))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        FlowTrainer.resume(path, OPTIONS)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="format None"):
        FlowTrainer.resume(path, OPTIONS)
    with torch.no_grad():
        trainer.network.start.weight[0, 0] = torch.nan
    trainer.save(path)
    with pytest.raises(CheckpointError, match="damaged weights"):
        FlowTrainer.resume(path, OPTIONS)
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="cannot be written"):
        trainer.save(tmp_path / "file" / "t")


def test_a_diverged_loss_stops_the_training() -> None:
    trainer = new_trainer()
    trainer.train(1)
    with torch.no_grad():
        trainer.network.state_head[-1].bias[0] = torch.inf
    with pytest.raises(CheckpointError, match="at step 1"):
        trainer.train(1)


def test_tensorboard_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = OPTIONS.model_copy(
        update={"highest_inverse_temperature": 5.0, "lowest_inverse_temperature": 5.0}
    )
    metrics = new_trainer(options, tmp_path).train()
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "loss/total",
        "loss/rtb",
        "log_z",
        "calibration/rms_error",
        "gradient_norm",
        "replay/size",
    } <= tags
    points = events.Scalars("loss/total")
    assert [p.step for p in points] == [4, 8, 12] and points[-1].value == pytest.approx(
        metrics["loss/total"]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rtbb": 1.0}, "Did you mean 'rtb'"),
        ({"learning_rate": 0}, "learning_rate: 0"),
        ({"steps": 1.5}, "steps: 1.5"),
        ({"log_partition_variance": 1, "per_context": 1}, "per_context >= 2"),
        ({"rtb": 0, "bellman": 0, "terminal": 0, "tie": 0}, "all loss weights are 0"),
        ({"lowest_inverse_temperature": 3}, "must not exceed"),
    ],
)
def test_options_are_strict(values: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FlowTrainOptions.parse(values)


def test_an_empty_replay_buffer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="empty"):
        FlowTrainer(build_network(SPEC), ReplayBuffer(5), OPTIONS).train(1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    info = FlowInfo(card_of(toy("A")).identity, "toy", (1.0, 5.0), 3, {"loss": 0.25})
    save_flow(tmp_path / "flow", build_network(SPEC), info)
    return tmp_path / "flow"


def rewrite(directory: Path, **changes: object) -> None:
    head = json.loads((directory / INFO_FILE).read_text())
    (directory / INFO_FILE).write_text(json.dumps({**head, **changes}))


def test_a_flow_comes_back_as_it_was(saved: Path) -> None:
    torch.manual_seed(1)
    network = build_network(SPEC)
    states = [(Root((1, 2), b"r"), (3,)), (Root((1, 2), b"r"), ())]
    flow = Flow.load(saved, card=card_of(toy("A")), reward="toy")
    again = Flow(network, flow.info)
    assert flow.info.version == 3 and flow.info.metrics == {"loss": 0.25}
    assert flow.identity == again.identity
    assert np.array_equal(
        flow.log_tilts(states, 2.0, LOG_ROWS), again.log_tilts(states, 2.0, LOG_ROWS)
    )
    assert [path.name for path in sorted(saved.iterdir())] == [INFO_FILE, WEIGHTS_FILE]


def test_a_flow_for_another_model_or_reward_is_refused(saved: Path) -> None:
    card = card_of(toy("A"))
    with pytest.raises(CheckpointError, match="trained for model"):
        Flow.load(saved, card=replace(card, identity="0" * 32))
    with pytest.raises(CheckpointError, match="vocab_size 5"):
        Flow.load(saved, card=card_of(toy("B")))
    with pytest.raises(CheckpointError, match="allowed tokens"):
        Flow.load(saved, card=replace(card, spec={"allowed": [0, 4], "end_tokens": []}))
    with pytest.raises(CheckpointError, match="trained for reward 'toy', given 'spectral'"):
        Flow.load(saved, reward="spectral")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "sdt-flow/0"}, "format 'sdt-flow/0'"),
        ({"spec": {**SPEC.to_dict(), "hidden_size": -1}}, "hidden_size"),
        ({"spec": {**SPEC.to_dict(), "hidden_size": 2**12}}, "does not fit its spec"),
        ({"spec": {**SPEC.to_dict(), "depth": 1}}, "unknown fields"),
        ({"spec": None}, "a spec"),
        ({"info": {}}, "must have the fields"),
        (
            {
                "info": {
                    "model": 1,
                    "reward": "",
                    "inverse_temperatures": [1.0, 2.0],
                    "version": 0,
                    "metrics": {},
                }
            },
            "model: 1",
        ),
        (
            {
                "info": {
                    "model": "",
                    "reward": "",
                    "inverse_temperatures": [2.0, 1.0],
                    "version": 0,
                    "metrics": {},
                }
            },
            "lowest <= highest",
        ),
        (
            {
                "info": {
                    "model": "",
                    "reward": "",
                    "inverse_temperatures": 1.0,
                    "version": 0,
                    "metrics": {},
                }
            },
            "two numbers",
        ),
        (
            {
                "info": {
                    "model": "",
                    "reward": "",
                    "inverse_temperatures": [1.0, 1.0],
                    "version": -1,
                    "metrics": {},
                }
            },
            "version",
        ),
        ({"weights": "0" * 32}, "two versions"),
    ],
)
def test_foreign_flow_files_are_refused(saved: Path, changes: dict, message: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        Flow.load(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    path = saved / WEIGHTS_FILE
    weights = load_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Flow.load(saved)
    save_file({**weights, "start.weight": weights["start.weight"] * torch.nan}, path)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        Flow.load(saved)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="two versions, or damage"):
        Flow.load(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Flow.load(saved)
    (saved / INFO_FILE).write_text("[" * 10)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Flow.load(saved)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    network = build_network(SPEC)
    with torch.no_grad():
        network.start.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        save_flow(tmp_path, network, FlowInfo("m", "r", (1.0, 1.0)))
    assert not list(tmp_path.iterdir())


def test_a_network_for_values_is_not_trained_without_its_path() -> None:
    with pytest.raises(ConfigurationError, match="path: 0"):
        new_trainer(OPTIONS.model_copy(update={"path": 0.0}))
