"""vLLM engines inside Ray actors: an evaluation over them, and engines and servers that are killed under it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sdt_dist.actors.config import fleet_config
from sdt_dist.actors.evaluation import OnFleet
from tests.evaluation_helpers import evaluate_into
from tests.ray_helpers import actor_processes

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(900)]
SETTINGS = {
    "model": "vllm:bundled", "num_problems": 4, "horizon": 24, "context_length": 64, "methods": ["snis", "dts"],
    "num_rollouts": 48, "num_samples": 6, "wave_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


def _engine(server_pid: int) -> psutil.Process | None:
    children = psutil.Process(server_pid).children(recursive=True)
    return next((child for child in children if "EngineCore" in child.name()), None)


def _killer(
    victim: Callable[[int], psutil.Process | None], killed: list[psutil.Process]
) -> Callable[[dict], None]:
    """Watches a run and kills one process of its model server once two searches are done."""

    def look(status: dict) -> None:
        if status["done"] >= 2 and not killed:
            process = victim(actor_processes()["model-server-0"])
            if process is not None:
                killed.extend([*process.children(recursive=True), process])
                process.kill()

    return look


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("victim", [_engine, psutil.Process], ids=["the engine", "its server"])
def test_a_run_goes_on_when_a_process_of_its_model_server_is_killed(tmp_path: Path, victim):
    killed: list[psutil.Process] = []
    executor = OnFleet(fleet_config({}), watch=_killer(victim, killed))
    evaluate_into(tmp_path, SETTINGS, executor=executor)
    assert killed
    _gone, alive = psutil.wait_procs(killed, timeout=5)
    assert not alive, "the engine outlived its server"
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {(line["problem"], line["label"], line["status"]) for line in lines} == {
        (problem, label, "ok") for problem in range(4) for label in ("snis", "dts")
    }
    assert not any(line["deterministic"] for line in lines)
