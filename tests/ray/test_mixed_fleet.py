"""One hf and one mlx server on real Ray serve one evaluation: valid results, marked not deterministic.

See docs/architecture/search.md, docs/architecture/fleet.md.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from sdt_dist.actors.config import fleet_config
from sdt_dist.actors.evaluation import OnFleet
from tests.evaluation_helpers import evaluate_into
from tests.ray_helpers import actor_processes, wait_for_deaths

pytestmark = [pytest.mark.ray, pytest.mark.mlx, pytest.mark.usefixtures("local_ray")]

METHODS = ["sample", "snis", "dts", "residual_ts"]
SETTINGS = {"methods": METHODS, "num_problems": 4, "horizon": 8, "context_length": 64, "num_rollouts": 96,
            "num_samples": 6, "wave_size": 4, "model": "bundled"}  # fmt: skip
FLEET = {
    "servers": 1,
    "searchers": 2,
    "problems_per_searcher": 4,
    "more_servers": [{"model": "mlx:bundled"}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, local_ray):
    """(result lines, the model calls that each server answered, the pids of all actors) of an evaluation."""
    folder = tmp_path_factory.mktemp("mixed")
    calls = dict[str, int]()
    pids = dict[str, int]()

    def watch(status):
        pids.update(actor_processes())
        for name, slot in status["slots"].items():
            if name.startswith("model-server"):
                calls[name] = max(calls.get(name, 0), slot.get("calls", 0))

    executor = OnFleet(fleet_config(FLEET), watch=watch)
    evaluate_into(folder, SETTINGS, executor=executor)
    return (
        [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()],
        calls,
        pids,
    )


def test_both_servers_answer(run):
    _, calls, _ = run
    assert calls.keys() == {"model-server-0", "model-server-1"}
    assert min(calls.values()) > 1, f"one call is the probe: {calls}"


def test_results_are_complete_finite_and_say_that_only_seeds_are_promised(run):
    lines, _, _ = run
    pairs = {(line["problem"], line["label"]) for line in lines}
    assert len(lines) == len(pairs) == 4 * len(METHODS)
    for line in lines:
        assert line["status"] == "ok" and line["deterministic"] is False, line
        assert np.isfinite(line["samples"]).all() and np.shape(line["samples"]) == (6, 8)
        assert np.isfinite(line["rewards"]).all() and np.isfinite(line["log_probs"]).all()
        assert sum(line["weights"]) == pytest.approx(1.0) and line["nfe"] > 0
        assert line["log_z"] is None or np.isfinite(line["log_z"])


def test_no_actor_outlives_the_run(run):
    _, _, pids = run
    assert {"model-server-0", "model-server-1", "searcher-0", "searcher-1"} <= pids.keys()
    wait_for_deaths(pids.values())
