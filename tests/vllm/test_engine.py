"""How an engine starts and ends: its probe, its death, that of its owner, and a fleet that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from sdt_dist.errors import CheckpointError, ConfigurationError, FleetError, ModelGoneError
from sdt_dist.models.loading import load_model
from sdt_dist.models.vllm.loading import open_model
from sdt_dist.protocols import RolloutRequest
from tests.one_package import python_path
from tests.vllm.conftest import LAW, root

pytestmark = pytest.mark.vllm
GONE_S = 5.0


def _cores(pid: int) -> list[psutil.Process]:
    """The engine processes under a process."""
    return [
        p
        for p in psutil.Process(pid).children(recursive=True)
        if "EngineCore" in p.name() or "Worker" in p.name()
    ]


def test_a_killed_engine_is_an_error_and_not_a_hang(opened):
    others = _cores(os.getpid())
    model = opened()
    (core,) = [process for process in _cores(os.getpid()) if process not in others]
    core.kill()
    with pytest.raises(ModelGoneError, match="load the model again"):
        model.rollout([RolloutRequest(root(0), (), 100, 1)], LAW)
    with pytest.raises(ModelGoneError):
        model.rollout([RolloutRequest(root(1), (), 100, 1)], LAW)


@pytest.mark.parametrize(
    ("separate_workers", "busy"), [(False, False), (False, True), (True, True)]
)
def test_the_engine_ends_with_its_owner(folder, tmp_path, separate_workers, busy):
    """SIGKILL of the owner: no handler of its runs; with workers of its own the engine is two processes.

    The owner is a script without a guard, which the engine's process must not run once more. A busy one leaves rows unread.
    """
    script = tmp_path / "owner.py"
    script.write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from sdt_dist.models.reduction import draw\n"
        "from sdt_dist.models.vllm.loading import open_model\n"
        "from sdt_dist.protocols import RolloutRequest\n"
        "from tests.vllm.conftest import LAW, root\n"
        f"model = open_model(Path({str(folder)!r}))\n"
        "print('ready', flush=True)\n"
        f"while {busy}:\n"
        "    model.rollout([RolloutRequest(root(i), (), 100, i) for i in range(64)], LAW)\n"
        "time.sleep(600)\n"
    )
    more = {"PYTHONPATH": python_path(os.getcwd())} | (
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if separate_workers else {}
    )
    owner = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, **more}
    )
    assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
    cores = _cores(owner.pid)
    assert len(cores) == (2 if separate_workers else 1)
    time.sleep(2.0 if busy else 0.0)
    owner.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    _gone, alive = psutil.wait_procs(cores, timeout=GONE_S)
    owner.wait()
    owner.stdout.close()
    assert not alive, f"{alive} outlived their owner by {time.monotonic() - begin:.1f} s"


def test_whoever_waits_when_the_engine_is_closed_is_told(opened):
    model = opened()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            model.rollout, [RolloutRequest(root(i), (), 110, i) for i in range(64)], LAW
        )
        while model.model_calls < 5:
            time.sleep(0.01)
        model.close()
        with pytest.raises(ModelGoneError, match="closed"):
            waiting.result(20)


def test_damaged_weights_are_named(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has damaged weights"):
        open_model(tmp_path)


def test_the_socket_is_its_owners_only(opened):
    path = opened().engine._listener.path
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_vllm_that_does_not_call_logits_processors_is_refused(opened, monkeypatch):
    """As if a version ignored them: the start-up probe gets no rows."""
    monkeypatch.setattr("sdt_dist.models.vllm.engine._REDUCER", "tests.vllm.deaf:Deaf")
    with pytest.raises(FleetError, match=r"vLLM 0\.32.*probe"):
        opened()


def test_a_model_that_vllm_cannot_serve_is_a_users_mistake(folder, tmp_path):
    (tmp_path / "config.json").write_text(
        (folder / "config.json").read_text().replace("llama", "lama")
    )
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        load_model(f"vllm:{tmp_path}")
    with pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES"):
        load_model("vllm:bundled", device="cuda")
