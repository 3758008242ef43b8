"""`sdt train-flow --live` on real Ray: the learner is killed by a signal, searches go on, and the flow is whole.

See docs/architecture/fleet.md, docs/concepts/flow.md.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sdt_dist.cluster.cli import main
from sdt_dist.flow.flow import Flow
from sdt_dist.training.flow.learner import LOSSES_FILE
from sdt_dist.training.flow.loss_log import read_losses
from tests.ray_helpers import actor_processes, wait_for_deaths

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

SMALL = [
    "train-flow", "--live", "--max-new-tokens", "4", "--rounds", "2", "--steps-per-round", "16", "--hidden-size", "8",
    "--key-size", "4", "--num-children", "6", "--contexts-per-round", "2", "--rollouts", "4",
    "--lowest-inverse-temperature", "2", "--set", "num_contexts=2", "--set", "save_every=5", "--set", "calibrate_every=10",
    "--servers", "1", "--searchers", "1",
]  # fmt: skip
KILL_AT = 20


def _kill_learner(losses: Path, killed: list[int]) -> None:
    """Once the second round has begun; steps are read where the learner writes them."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not killed:
        if losses.exists() and len(read_losses(losses)) >= KILL_AT:
            pids = actor_processes()
            killed.extend(pids.values())
            os.kill(pids["learner-0"], signal.SIGKILL)
        time.sleep(0.02)


def test_a_live_training_whose_learner_is_killed_ends_with_a_whole_flow(
    tmp_path, monkeypatch, capsys
):
    output = tmp_path / "flow"
    killed = list[int]()
    killer = threading.Thread(target=_kill_learner, args=(output / LOSSES_FILE, killed))
    killer.start()
    monkeypatch.setattr(sys, "argv", ["sdt", *SMALL, "--output", str(output)])
    with pytest.raises(SystemExit) as done:
        main()
    killer.join()
    printed = capsys.readouterr()
    assert not done.value.code, printed.err
    assert f"flow: {output} (version 2, 32 steps" in printed.out and "learner-0" in printed.err
    assert [line["step"] for line in read_losses(output / LOSSES_FILE)] == list(range(1, 33))
    assert Flow.load(output).info.version == 2
    card = json.loads((output / "card.json").read_text())
    assert card["version"] == 2 and card["repeatable_from_seed"].startswith("no")
    assert sum(facts["searches"] for found in card["rounds"] for facts in found) >= 4
    assert (output / "curves.png").stat().st_size > 10_000
    wait_for_deaths(killed)
    monkeypatch.setattr(sys, "argv", ["sdt", *SMALL, "--output", str(output)])
    with pytest.raises(SystemExit) as refused:
        main()
    assert (
        refused.value.code == 2
        and "already holds a training; add --resume" in capsys.readouterr().err
    )
