"""A real head and worker, started by our scripts: attaching, what is said when that fails, jobs, status.

See docs/architecture/fleet.md, docs/guides/evaluate.md#bad-input.

Everything runs in processes of its own with a home of its own, so that no token, variable or Ray of the machine is used.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.evaluation_helpers import evaluate_into
from tests.one_package import python_path

ROOT = Path(__file__).parents[2]
NODES = ROOT / "cluster/nodes"
SDT = [sys.executable, "-m", "sdt_dist.cluster.cli"]
PORTS = ("node-manager-port", "object-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
         "runtime-env-agent-port", "metrics-export-port")  # fmt: skip
PROBE = """
import json, sys, time
from sdt_dist.cluster.connect import connect
from sdt_dist.errors import SdtError
begun = time.monotonic()
try:
    with connect(sys.argv[1], timeout_s=float(sys.argv[2])) as connection:
        from sdt_dist.actors.placement import cluster_nodes
        found = {"namespace": connection.namespace, "dashboard": connection.dashboard_url,
                 "labels": [dict(node.labels) for node in cluster_nodes()]}
except SdtError as error:
    found = {"error": str(error)}
print(json.dumps(found | {"seconds": time.monotonic() - begun}))
"""

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


@dataclass(frozen=True)
class Head:
    """A running head with a worker, and how to run a process that knows its token."""

    home: Path
    gcs: int
    dashboard: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, env=_environment(self.home) | variables, cwd=ROOT, capture_output=True, text=True,
                              timeout=240)  # fmt: skip
        token = (self.home / ".ray/auth_token").read_text()
        assert token not in done.stdout + done.stderr
        return done

    def attach(self, address: str, timeout_s: float = 20.0, **variables: str) -> dict:
        done = self.run(sys.executable, "-c", PROBE, address, str(timeout_s), **variables)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return json.loads(done.stdout)


def _environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "HOME": str(home),
        "SDT_VENV": sys.prefix,
        "PYTHONPATH": python_path(ROOT),
        "HF_HUB_OFFLINE": "1",
    }


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [link.getsockname()[1] for link in held]
    for link in held:
        link.close()
    return ports


@contextmanager
def _started(home: Path, script: str, *arguments: str, **variables: str) -> Iterator[None]:
    """One of our start scripts with --block, in a process group of its own that ends with the test."""
    ports = [f"--{name}={port}" for name, port in zip(PORTS, _free_ports(len(PORTS)), strict=True)]
    log = home / f"{script}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["bash", str(NODES / script), *arguments, *ports, f"--temp-dir={home}/{script[6:8]}", "--block"],
            env=_environment(home) | variables, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until(lambda: "runtime started" in log.read_text(), process, log)
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=10)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait(timeout=10)


def _wait_until(done, process: subprocess.Popen, log: Path, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(
        prefix="sdt", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        home = Path(folder)
        gcs, dashboard, client = _free_ports(3)
        options = [
            f"--ray-client-server-port={client}",
            "--num-cpus=2",
            "--labels=sdt-role=searcher",
        ]
        ports = {"RAY_PORT": str(gcs), "RAY_DASHBOARD_PORT": str(dashboard)}
        worker = [f"127.0.0.1:{gcs}", "model-server", "--num-cpus=1"]
        with (
            _started(home, "start_head.sh", *options, **ports),
            _started(home, "start_worker.sh", *worker),
        ):
            yield Head(home, gcs, dashboard)


def test_the_token_is_private_and_the_dashboard_on_loopback(head):
    assert (head.home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    own = [
        entry[4][0]
        for entry in socket.getaddrinfo(socket.gethostname(), head.dashboard, socket.AF_INET)
    ]
    for address in {a for a in own if not a.startswith("127.")}:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, head.dashboard), timeout=5)
    socket.create_connection(("127.0.0.1", head.dashboard), timeout=5).close()


def test_attaching_by_address_and_as_in_a_job(head):
    direct = head.attach(f"127.0.0.1:{head.gcs}")
    assert direct["dashboard"] == head.url and direct["namespace"].startswith("sdt-")
    assert {labels["sdt-role"] for labels in direct["labels"]} == {"searcher", "model-server"}
    in_job = head.attach("auto", RAY_ADDRESS=f"127.0.0.1:{head.gcs}", RAY_AUTH_MODE="token")
    assert in_job["dashboard"] == head.url and in_job["namespace"] != direct["namespace"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"RAY_AUTH_MODE": "disabled"},
            "wants a token, and RAY_AUTH_MODE is disabled. Fix: export RAY_AUTH_MODE=token",
        ),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"},
            "refused the token from RAY_AUTH_TOKEN",
        ),
        ({"RAY_AUTH_MODE": "token", "HOME": "/nonexistent"}, "there is no token here"),
    ],
)
def test_what_is_said_without_the_right_token(head, variables, said):
    found = head.attach(f"127.0.0.1:{head.gcs}", **variables)
    assert said in found["error"] and found["seconds"] < 20


def test_the_dashboards_port_is_not_the_heads(head):
    found = head.attach(f"127.0.0.1:{head.dashboard}")
    assert "not the dashboard's" in found["error"] and found["seconds"] < 5


def test_a_frozen_head_ends_at_the_deadline(head):
    lines = {
        process.pid: " ".join(process.info["cmdline"] or [])
        for process in psutil.process_iter(["cmdline"])
    }
    [pid] = [
        pid for pid, line in lines.items() if "/gcs_server " in line and f"{head.home}/" in line
    ]
    os.kill(pid, signal.SIGSTOP)
    try:
        found = head.attach(f"127.0.0.1:{head.gcs}", timeout_s=2.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "no answer in time" in found["error"] and 1.5 < found["seconds"] < 6


def test_a_job_gives_the_samples_of_one_process_and_keeps_them(head, tmp_path):
    settings = {
        "methods": ["snis", "residual_ts"],
        "num_problems": 2,
        "num_rollouts": 8,
        "horizon": 8,
        "num_samples": 4,
    }
    (tmp_path / "small.yaml").write_text(json.dumps(settings))
    job = [*SDT, "cluster", "submit", "--address", head.url, "--working-dir", str(tmp_path)]
    done = head.run(*job, "--", "evaluate", "small.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.splitlines()[-1].endswith(": succeeded")
        and f"Ray dashboard: {head.url}" in done.stdout
    )
    [results] = (head.home / "sdt-results").iterdir()
    evaluate_into(tmp_path / "alone", str(tmp_path / "small.yaml"))
    have = _samples(results)
    want = _samples(tmp_path / "alone")
    assert len(want) == 4 and have == want
    done = head.run(*job, "--", "report", "/nowhere")
    assert (
        done.returncode == 1
        and done.stdout.rstrip().endswith(": failed")
        and "/nowhere" in done.stdout
    )


def _samples(directory: Path) -> dict[tuple[str, int], object]:
    lines = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    return {
        (line["label"], line["problem"]): (line["samples"], line["rewards"], line["nfe"])
        for line in lines
    }


def test_doctor_looks_at_every_node_from_within(head):
    done = head.run(*SDT, "doctor", "--address", f"127.0.0.1:{head.gcs}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("labels sdt-role=") == 2 and done.stdout.count("MiB of weights") == 2
    assert f"dashboard    {head.url}, loopback only" in done.stdout and done.stdout.endswith(
        "ready\n"
    )


def test_jobs_and_status_say_when_the_token_is_not_sent(head):
    for command in (
        ["submit", "--address", head.url, "--", "doctor"],
        ["status", "--address", head.url],
    ):
        done = head.run(*SDT, "cluster", *command, RAY_AUTH_MODE="disabled")
        assert (
            done.returncode == 2
            and "export RAY_AUTH_MODE=token" in done.stderr
            and done.stderr.count("\n") == 1
        )


def test_status_shows_nodes_labels_and_our_actors(head):
    script = (
        "import subprocess, sys, ray\nfrom sdt_dist.cluster.connect import connect\n"
        "with connect(sys.argv[1], namespace='run-7'):\n"
        "    actor = ray.remote(num_cpus=0)(type('SearcherActor', (), {'ping': lambda self: 1}))\n"
        "    kept = actor.options(name='sdt:searcher-0').remote()\n    ray.get(kept.ping.remote())\n"
        "    waiting = actor.options(name='sdt:searcher-1', label_selector={'sdt-role': 'none'}).remote()\n"
        "    sys.exit(subprocess.run(sys.argv[2:]).returncode)\n"
    )
    for address in (head.url, f"127.0.0.1:{head.gcs}"):
        command = [*SDT, "cluster", "status", "--address", address]
        done = head.run(sys.executable, "-c", script, f"127.0.0.1:{head.gcs}", *command)
        assert done.returncode == 0, done.stderr
        assert (
            "labels sdt-role=searcher (head)" in done.stdout
            and "labels sdt-role=model-server" in done.stdout
        )
        assert "run run-7" in done.stdout and "sdt:searcher-0           ALIVE" in done.stdout
        assert (
            "sdt:searcher-1           PENDING_CREATION" in done.stdout
            and "wants sdt-role=none" in done.stdout
        )


def test_local_mode_is_quiet_private_and_on_loopback(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROBE, "local", "60"], env=_environment(tmp_path), cwd=ROOT,
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    assert found["dashboard"].startswith("http://127.0.0.1:") and len(found["labels"]) == 1
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
