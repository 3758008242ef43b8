"""Cluster files that cannot be launched here: against Ray's schema, for structure, and against the fleet they promise to hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdt_dist.actors.config import load_fleet
from sdt_dist.actors.placement import Node, check_placement, fleet_requests

ROOT = Path(__file__).parents[2]
NODES = ROOT / "cluster/nodes"
KUBERAY = ROOT / "cluster/kuberay"
FLEET = ROOT / "examples/fleet_gpu.yaml"
PIN = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def _launcher() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def _kuberay(name: str) -> dict[str, Any]:
    """The Ray resource of a manifest, which may hold others too."""
    documents = list(yaml.safe_load_all((KUBERAY / name).read_text()))
    [found] = [document for document in documents if document["apiVersion"] == "ray.io/v1"]
    return found


def _spec(name: str) -> dict[str, Any]:
    spec = _kuberay(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def _bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(NODES / script), *arguments]
    return subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def fake_ray(tmp_path: Path) -> Path:
    """An environment whose `ray` prints what it was asked, and the variables that matter."""
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text('#!/bin/sh\n[ "$1" = get-auth-token ] && mkdir -p ~/.ray && echo t > ~/.ray/auth_token && exit\n'
                   'echo "ray $* mode=$RAY_AUTH_MODE mac=$RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"\n')  # fmt: skip
    ray.chmod(0o755)
    return tmp_path


def test_launcher_file_passes_rays_own_check():
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = _launcher()
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    validate_config(prepare_config(config))


def test_launcher_file_names_a_provider_and_the_pinned_ray():
    config = _launcher()
    assert config["provider"] == {
        "type": "aws",
        "region": "us-west-2",
        "cache_stopped_nodes": False,
    }
    assert f":{PIN}-py311" in config["docker"]["image"]
    assert (
        sum(kind.get("min_workers", 0) for kind in config["available_node_types"].values())
        == config["max_workers"]
    )
    assert "never launched" in (ROOT / "ray_cluster.yaml").read_text()


def test_launcher_file_keeps_token_and_loopback():
    config = _launcher()
    starts = [
        command
        for part in ("head", "worker")
        for command in config[f"{part}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_the_example_fleet_fits_on_the_launched_cluster():
    kinds = _launcher()["available_node_types"]
    nodes = [
        Node(f"{name}-{i}", kind["resources"], kind.get("labels", {}))
        for name, kind in kinds.items()
        for i in range(kind.get("min_workers", 1))
    ]
    plan = check_placement(fleet_requests(load_fleet(str(FLEET), {}), shards=True), nodes)
    assert all(name.startswith("model_server") for name in plan.on("server"))
    assert all(name.startswith("searcher") for name in plan.on("searcher"))


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_example_fleet_fits_on_kubernetes(name):
    nodes = []
    for group in _spec(name)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        nodes += [
            Node(f"{group['groupName']}-{i}", resources, group["labels"])
            for i in range(group["minReplicas"])
        ]
    plan = check_placement(fleet_requests(load_fleet(str(FLEET), {}), shards=True), nodes)
    assert sum(plan.on("server").values()) == 4 and sum(plan.on("searcher").values()) == 16


@pytest.mark.parametrize(
    ("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")]
)
def test_kubernetes_manifests_have_what_kuberay_requires(name, kind):
    resource = _kuberay(name)
    spec = _spec(name)
    assert resource["kind"] == kind and resource["metadata"]["name"]
    assert spec["rayVersion"] == PIN
    assert spec["authOptions"] == {"mode": "token", "secretName": "sdt-ray-token"}
    assert (
        spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        and spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    )
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert (
            container["image"]
            and container["resources"]["requests"] == container["resources"]["limits"]
        )
        assert all(isinstance(value, str) for value in container["resources"]["limits"].values())
        assert "labels" not in group["rayStartParams"], "KubeRay refuses labels there"
    for group in groups[1:]:
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


def test_the_job_runs_on_the_cluster_of_the_other_manifest_and_keeps_its_results():
    job = _kuberay("rayjob.yaml")["spec"]
    assert job["rayClusterSpec"] == _spec("raycluster.yaml")
    assert job["shutdownAfterJobFinishes"] is True and job["submissionMode"] == "K8sJobMode"
    assert job["entrypoint"] == "sdt evaluate --address auto --output /results/run1 --resume"
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["volumeMounts"] == [{"name": "results", "mountPath": "/results"}]
    claims = [
        d
        for d in yaml.safe_load_all((KUBERAY / "rayjob.yaml").read_text())
        if d["kind"] == "PersistentVolumeClaim"
    ]
    assert head["volumes"] == [
        {"name": "results", "persistentVolumeClaim": {"claimName": claims[0]["metadata"]["name"]}}
    ]


def test_no_manifest_holds_a_token_and_the_image_is_of_the_pinned_ray():
    assert f"FROM rayproject/ray:{PIN}-py311-gpu" in (KUBERAY / "Dockerfile").read_text()
    for file in KUBERAY.iterdir():
        assert not re.search(r"\b[0-9a-f]{32,}\b", file.read_text())


@pytest.mark.parametrize("script", sorted(NODES.glob("*.sh"), key=str), ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""
    assert os.access(script, os.X_OK) or script.name == "common.sh"


def test_head_script_makes_a_private_token_and_binds_the_dashboard_to_loopback(fake_ray):
    done = _bash("start_head.sh", "--num-cpus=0", SDT_VENV=str(fake_ray), HOME=str(fake_ray))
    assert done.returncode == 0, done.stderr
    assert "ray start --head --port=6379 --dashboard-host=127.0.0.1" in done.stdout
    assert "--num-cpus=0 mode=token" in done.stdout
    assert (fake_ray / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def test_worker_script_labels_the_node(fake_ray):
    (fake_ray / ".ray").mkdir()
    (fake_ray / ".ray/auth_token").write_text("t")
    run = {"SDT_VENV": str(fake_ray), "HOME": str(fake_ray)}
    done = _bash("start_worker.sh", "head:6379", "model-server", "--num-gpus=1", **run)
    assert (
        "ray start --address=head:6379 --disable-usage-stats --labels=sdt-role=model-server --num-gpus=1 mode=token"
        in done.stdout
    )
    done = _bash("start_worker.sh", "head:6379", "--labels-file=labels.yaml", **run)
    assert "--disable-usage-stats --labels-file=labels.yaml mode=token" in done.stdout
    assert (fake_ray / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def test_worker_scripts_refuse_what_cannot_work(fake_ray):
    run = {"SDT_VENV": str(fake_ray), "HOME": str(fake_ray)}
    done = _bash("start_worker.sh", "head:6379", "searcher", **run)
    assert (
        done.returncode == 2
        and "no token in" in done.stderr
        and "scp -p HEAD:.ray/auth_token" in done.stderr
    )
    done = _bash("start_worker.sh", "head:6379", **run)
    assert done.returncode == 2 and "start_worker.sh HEAD:6379 model-server" in done.stderr
    done = _bash("start_mac.sh", "head:6379", "10.0.0.9", **run)
    assert done.returncode == 2 and "this is not macOS" in done.stderr


def test_mac_script_sets_the_variable_and_the_address(fake_ray):
    uname = fake_ray / "bin/uname"
    uname.write_text("#!/bin/sh\necho Darwin\n")
    uname.chmod(0o755)
    done = _bash(
        "start_mac.sh",
        "head:6379",
        "10.0.0.9",
        SDT_VENV=str(fake_ray),
        HOME=str(fake_ray),
        RAY_AUTH_TOKEN="t",
    )
    assert "--node-ip-address=10.0.0.9" in done.stdout and done.stdout.rstrip().endswith(
        "mode=token mac=1"
    )
    said = (NODES / "start_mac.sh").read_text()
    assert "not a supported way" in said and "sdt serve" in said
