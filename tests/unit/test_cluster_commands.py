"""Connecting, doctor and job commands without Ray: what is refused, with which words.

See docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdt_dist.actors.config import Placement, fleet_config
from sdt_dist.actors.placement import Node, plan_placement
from sdt_dist.cluster import diagnosis
from sdt_dist.cluster.auth import AuthState, auth_state, create_private_token
from sdt_dist.cluster.connect import check_attachable
from sdt_dist.cluster.jobs import check_dashboard_url, job_command
from sdt_dist.cluster.probe import ClusterFacts, check_address, probe, resolve
from sdt_dist.cluster.survey import look
from sdt_dist.errors import ConfigurationError, FleetError

VARIABLES = (
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_USE_TLS",
)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    """A home without a token, and no variable of Ray's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def listener() -> Iterator[tuple[str, list[bytes]]]:
    """A TCP server's address, and what it answers to whoever connects; nothing while that is empty."""
    answers: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def serve() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            kept.append(link)
            if answers:
                link.sendall(answers[0])

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"127.0.0.1:{server.getsockname()[1]}", answers
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    for link in kept:
        link.close()


def _facts(**changed: object) -> ClusterFacts:
    import platform

    import ray

    known = {"address": "10.0.0.5:6379", "ray_version": ray.__version__, "python_version": platform.python_version(),
             "nodes": (Node("10.0.0.5", {}),), "dashboard_url": None, "local_node": None}  # fmt: skip
    return ClusterFacts(**(known | changed))


@pytest.mark.parametrize(
    "address", ["head", "head:port", ":6379", "http://head:8265", "head:0", "head:70000", ""]
)
def test_what_is_no_address(address):
    with pytest.raises(ConfigurationError, match=r"none of: local, auto, HOST:PORT"):
        check_address(address)


def test_ray_client_addresses_are_refused_with_the_reason():
    with pytest.raises(
        ConfigurationError,
        match=r"ray://\) is not supported: it relays every call.*sdt cluster submit",
    ):
        check_address("ray://head:10001")


def test_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        FleetError, match=rf"no cluster at 127.0.0.1:{port} .*Fix: .*ray start --head.*ssh -L 8265"
    ):
        probe(f"127.0.0.1:{port}")


def test_a_port_that_does_not_answer_ends_at_the_deadline(listener):
    address, _ = listener
    begun = time.monotonic()
    with pytest.raises(FleetError, match=rf"no Ray at {address}.*gave no answer in time"):
        probe(address, timeout_s=0.5)
    assert time.monotonic() - begun < 2


def test_another_kind_of_server(listener):
    address, answers = listener
    answers.append(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(FleetError, match=r"not the dashboard's.*is not gRPC"):
        probe(address)


def test_token_mode_without_a_token_is_said_before_ray_aborts_the_process(listener, monkeypatch):
    address, answers = listener
    answers.append(b"\0\0\0\4\0\0\0\0\0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(
        FleetError, match=r"there is no token here. Fix: copy the head's ~/.ray/auth_token"
    ):
        probe(address)


def test_auto_takes_the_address_that_a_job_has(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert resolve("auto") == "10.1.2.3:6379"
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigurationError, match=r"RAY_ADDRESS 'http://127.0.0.1:8265' is none of"):
        resolve("auto")


@pytest.mark.parametrize("changed", [{"ray_version": "2.9.0"}, {"python_version": "3.9.1"}])
def test_other_versions_are_refused(changed):
    with pytest.raises(FleetError, match=r"Ray and Python X.Y must be equal"):
        check_attachable(_facts(**changed), time.monotonic() + 1)


def test_a_cluster_elsewhere_is_refused_with_the_way_to_use_it():
    with pytest.raises(FleetError, match=r"none of its nodes \(10.0.0.5\).*sdt cluster submit"):
        check_attachable(_facts(), time.monotonic() + 1)


def test_a_stuck_node_is_found_before_ray_hangs_on_it(listener):
    with pytest.raises(
        FleetError, match=r"its node on this host .* does not. Fix: restart that node"
    ):
        check_attachable(_facts(local_node=listener[0]), time.monotonic() + 0.3)


def test_tokens_are_private_and_never_replaced(home):
    assert auth_state() == AuthState("unset", None)
    create_private_token()
    file = home / ".ray/auth_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and re.fullmatch(
        "[0-9a-f]{64}", token := file.read_text()
    )
    create_private_token()
    assert file.read_text() == token
    state = auth_state()
    assert state.source == str(file) and not state.exposed and token not in repr(state)


def test_token_sources_in_rays_order(home, monkeypatch, tmp_path):
    create_private_token()
    other = tmp_path / "other"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    assert auth_state().source is None
    other.write_text("x")
    other.chmod(0o644)
    assert auth_state().source == str(other) and auth_state().exposed
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert auth_state().source == "RAY_AUTH_TOKEN" and "secret" not in repr(auth_state())


def test_doctor_on_authentication(home):
    assert diagnosis.check_auth(AuthState("token", None)).missing
    assert "CVE-2023-48022" in (diagnosis.check_auth(AuthState("disabled", None)).advice or "")
    create_private_token()
    assert diagnosis.check_auth(auth_state()) == diagnosis.Finding(
        "auth", f"RAY_AUTH_MODE unset, token in {home}/.ray/auth_token, mode 0600"
    )
    (home / ".ray/auth_token").chmod(0o644)
    assert "chmod 600" in (diagnosis.check_auth(auth_state()).advice or "")


def test_doctor_on_models(tmp_path):
    finding, files = diagnosis.check_model("bundled")
    assert finding.missing is None and files is not None and files.num_bytes > 1e6
    empty = tmp_path / "model"
    empty.mkdir()
    finding, files = diagnosis.check_model(str(empty))
    assert "readable *.safetensors" in finding.missing and files.num_bytes is None
    finding, files = diagnosis.check_model(str(tmp_path / "nowhere"), "10.0.0.5")
    assert (
        finding.name == "model 10.0.0.5" and "does not exist" in finding.missing and files is None
    )
    assert "hub cache" in diagnosis.check_model("someone/some-model")[0].text


def test_doctor_on_memory():
    plan = plan_placement(
        [diagnosis.fleet_requests(fleet_config({"servers": 3}))[0]], [Node("n", {"CPU": 8.0})]
    )
    files = diagnosis.ModelFiles("model", 2 * diagnosis.GIB)
    [enough] = diagnosis.check_memory(plan, {"server": files}, {"n": 15.0 * diagnosis.GIB})
    assert (
        enough.missing is None and enough.text == "3 x server need about 15.0 GiB on n, 15.0 free"
    )
    [short] = diagnosis.check_memory(plan, {"server": files}, {"n": 14.9 * diagnosis.GIB})
    assert "start fewer servers" in short.missing
    assert diagnosis.check_memory(plan, {"server": files}, {}) == []
    gpu = Placement(gpus=0.5)
    memories = [8 * diagnosis.GIB, 6 * diagnosis.GIB]
    assert diagnosis.check_gpu_memory(gpu, files, memories, "n")[0].missing
    assert diagnosis.check_gpu_memory(Placement(gpus=1.0), files, memories, "n")[0].missing is None
    assert diagnosis.check_gpu_memory(Placement(), files, memories, "n") == []


def test_doctor_on_a_mixed_fleet():
    """Every group's own model is looked at, and servers of all groups share a node's memory."""
    config = fleet_config(
        {"servers": 2, "more_servers": [{"model": "mlx:/models/x", "placement": {"gpus": 1.0}}]}
    )
    kinds = diagnosis.server_kinds(config, "bundled")
    assert [(kind, spec) for kind, spec, _ in kinds] == [
        ("server", "bundled"),
        ("server of mlx:/models/x", "mlx:/models/x"),
    ]
    assert [placement for _, _, placement in kinds] == [
        config.server,
        config.more_servers[0].placement,
    ]
    assert (
        diagnosis.this_machine(
            fleet_config({"more_servers": [{"model": "bundled", "count": 99}]}), 0
        ).resources["CPU"]
        > 99
    )
    plan = plan_placement(diagnosis.fleet_requests(config), [Node("n", {"CPU": 8.0, "GPU": 1.0})])
    files = {
        kind: diagnosis.ModelFiles(spec, size * diagnosis.GIB)
        for (kind, spec, _), size in zip(kinds, (2, 3), strict=True)
    }
    [enough] = diagnosis.check_memory(plan, files, {"n": 17.0 * diagnosis.GIB})
    assert (
        enough.missing is None and enough.text == "3 x server need about 17.0 GiB on n, 17.0 free"
    )
    [short] = diagnosis.check_memory(plan, files, {"n": 16.9 * diagnosis.GIB})
    assert short.missing
    [partly] = diagnosis.check_memory(plan, files | {kinds[1][0]: None}, {"n": 1e12})
    assert partly.text.startswith("2 x server need about 10.0 GiB")


def test_each_node_is_asked_for_the_models_of_servers_that_may_start_there(tmp_path):
    nowhere = f"mlx:{tmp_path}/nowhere"
    view = look("mac", ["bundled", nowhere])
    assert [finding.missing is None for finding in view.findings] == [True, False]
    assert view.files.keys() == {"bundled"} and view.free_bytes
    assert look("searcher", []).findings == ()


def test_doctor_on_the_dashboard(home):
    off = AuthState("disabled", None)
    on = AuthState("token", "file")
    assert diagnosis.check_dashboard("http://127.0.0.1:8265", off) == diagnosis.Finding(
        "dashboard", "http://127.0.0.1:8265, loopback only"
    )
    assert "CVE-2023-48022" in (
        diagnosis.check_dashboard("http://10.0.0.5:8265", off).missing or ""
    )
    guarded = diagnosis.check_dashboard("http://10.0.0.5:8265", on)
    assert guarded.missing is None and guarded.advice


def test_jobs_attach_and_keep_their_results():
    job = job_command(["evaluate", "--dataset", "my data.csv"])
    assert job.entrypoint == (
        f"sdt evaluate --dataset 'my data.csv' --address auto --output \"$HOME/sdt-results/{job.job_id}\""
    )
    assert job.output == f"$HOME/sdt-results/{job.job_id}" and job.job_id.startswith(
        "sdt-evaluate-"
    )
    assert job_command(
        ["evaluate", "--output=/shared/x", "--address", "10.0.0.5:6379"]
    ).entrypoint == ("sdt evaluate --output=/shared/x --address 10.0.0.5:6379")
    assert job_command(["doctor"]).entrypoint == "sdt doctor --address auto"
    assert job_command(["report", "/shared/x"]).output is None


def test_jobs_that_would_lose_their_results_are_refused():
    with pytest.raises(
        ConfigurationError, match=r"--output 'results/x'.*deleted when it ends.*absolute path"
    ):
        job_command(["evaluate", "--output", "results/x"])
    with pytest.raises(
        ConfigurationError, match=r"unknown command for a job 'evalate'. Did you mean 'evaluate'"
    ):
        job_command(["evalate"])


def test_dashboards_that_are_none():
    with pytest.raises(ConfigurationError, match=r"is no dashboard URL.*ssh -L 8265"):
        check_dashboard_url("ray://head:10001")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(FleetError, match=rf"no dashboard at http://127.0.0.1:{port} .*ssh -L 8265"):
        check_dashboard_url(f"http://127.0.0.1:{port}")
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
