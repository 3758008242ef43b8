"""What `sdt doctor` looks at, each as a finding: what is there, and what to do when it stands in the way of a run.

It must not start Ray or load a model.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdt_dist.actors.config import FleetConfig, Placement
from sdt_dist.actors.placement import Node, PlacementPlan, fleet_requests, plan_placement
from sdt_dist.cluster.auth import AuthState
from sdt_dist.errors import SdtError

GIB = 2**30
_WEIGHTS = ("*.safetensors", "*.gguf", "*.npz")
# A server holds its weights, in float32 where the file is 16-bit, beside Python, torch and caches of a gigabyte.
_COPIES = 2.0
_PROCESS_BYTES = 1.0 * GIB
# On a GPU the weights keep their type; the rest is caches and the library's own context.
_GPU_COPIES = 1.2


@dataclass(frozen=True)
class Finding:
    """One line: `missing` says what to do before a run can work, `advice` what would be better."""

    name: str
    text: str
    missing: str | None = None
    advice: str | None = None


@dataclass(frozen=True)
class ModelFiles:
    """The weights of a model on one host; `num_bytes` None: they are not on it, because of `elsewhere` if that is given."""

    place: str
    num_bytes: int | None
    elsewhere: str | None = None

    @property
    def server_bytes(self) -> float | None:
        """Estimated memory of a CPU server with this model."""
        return None if self.num_bytes is None else _COPIES * self.num_bytes + _PROCESS_BYTES


def check_auth(state: AuthState) -> Finding:
    """Token authentication as this process would use it."""
    text = f"RAY_AUTH_MODE {state.mode}, token {f'in {state.source}' if state.source else 'absent'}"
    missing = advice = None
    if state.mode == "token" and state.source is None:
        missing = "a token: `sdt evaluate` makes one for local runs; for a cluster copy its head's ~/.ray/auth_token here"
    if state.mode not in ("token", "unset"):
        advice = "token authentication is off: whoever reaches Ray's ports runs code here (CVE-2023-48022); unset RAY_AUTH_MODE"
    if state.exposed:
        advice = f"other users can read the token: chmod 600 {state.file}"
    return Finding(
        "auth",
        f"{text}{', mode 0600' if state.file and not state.exposed else ''}",
        missing,
        advice,
    )


def model_files(spec: str) -> ModelFiles:
    """Where this host has a MODEL SPEC's weights, and how large they are."""
    from sdt_dist.models.spec import HTTP, check_spec, outlook_of

    check_spec(spec)
    outlook = outlook_of(spec)
    name = outlook.name
    if outlook.backend in HTTP:
        from sdt_dist.models.remote.http_client import HttpModel

        HttpModel(name, timeout_s=10.0, attempts=1)
        return ModelFiles(name, None, elsewhere="a model server that answers")
    local = outlook.path
    if local is not None:
        readable = local.is_dir() and os.access(local, os.R_OK | os.X_OK)
        return ModelFiles(str(local), weight_bytes(local) if readable else None)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return ModelFiles(str(Path(cached).parent), weight_bytes(Path(cached).parent))
    return ModelFiles(f"hub id {name}", None, elsewhere="not in the hub cache, will be downloaded")


def weight_bytes(directory: Path) -> int | None:
    """Size of the weight files that this user can read in a directory; None when there are none."""
    files = [
        file for pattern in _WEIGHTS for file in directory.glob(pattern) if os.access(file, os.R_OK)
    ]
    return sum(file.stat().st_size for file in files) or None


def check_model(spec: str, host: str = "") -> tuple[Finding, ModelFiles | None]:
    """Whether a model can be read here, and its files."""
    name = f"model{f' {host}' if host else ''}"
    try:
        return describe_model(name, files := model_files(spec)), files
    except SdtError as error:
        return Finding(name, f"{spec} cannot be used", missing=str(error)), None


def server_kinds(config: FleetConfig, model: str) -> list[tuple[str, str, Placement]]:
    """(kind, MODEL SPEC, placement) of every group of model servers, those of the run's own `model` first."""
    return [
        ("server", model, config.server),
        *((group.kind, group.model, group.placement) for group in config.more_servers),
    ]


def describe_model(name: str, files: ModelFiles) -> Finding:
    """The finding about a model's files on one host."""
    if files.elsewhere is not None:
        return Finding(name, f"{files.place}, {files.elsewhere}")
    if files.num_bytes is None:
        fix = f"readable *.safetensors in {files.place}"
        return Finding(name, f"{files.place} holds no readable weights", missing=f"{name}: {fix}")
    return Finding(name, f"{files.place}, {files.num_bytes / 2**20:,.0f} MiB of weights")


def this_machine(config: FleetConfig, num_gpus: int) -> Node:
    """This machine as a node, as local mode starts it: with as many CPUs in Ray's books as the fleet asks for."""
    asked = sum(
        request.count * request.placement.cpus for request in fleet_requests(config, shards=True)
    )
    return Node(
        "this machine", {"CPU": max(float(os.cpu_count() or 1), asked), "GPU": float(num_gpus)}
    )


def check_fleet(config: FleetConfig, nodes: Sequence[Node]) -> tuple[list[Finding], PlacementPlan]:
    """What would be placed where, and what cannot be; store shards only where the fleet speaks of them."""
    shards = bool({"shard", "shards"} & config.model_fields_set)
    plan = plan_placement(fleet_requests(config, shards=shards), nodes)
    found = [
        Finding("place", f"{part.count} x {part.kind} on {part.node.name}") for part in plan.placed
    ]
    for gap in plan.missing:
        text = f"{gap.count} x {gap.kind} nowhere"
        found.append(
            Finding("place", text, missing=f"room for {gap.count} x {gap.kind}: {gap.reason}")
        )
    return found, plan


def check_memory(
    plan: PlacementPlan, files: Mapping[str, ModelFiles | None], free_bytes: Mapping[str, float]
) -> list[Finding]:
    """Whether each node has memory for the servers that would be on it, by kind with its files.

    Nodes of unknown memory and kinds of unknown size are left out.
    """
    sizes = {
        kind: known.server_bytes
        for kind, known in files.items()
        if known and known.server_bytes is not None
    }
    found = []
    for name, free_here in free_bytes.items():
        counts = {kind: plan.on(kind).get(name, 0) for kind in sizes}
        if not (count := sum(counts.values())):
            continue
        need = sum(counts[kind] * sizes[kind] for kind in sizes) / GIB
        free = free_here / GIB
        text = f"{count} x server need about {need:.1f} GiB on {name}, {free:.1f} free"
        fix = f"memory on {name}: {text}; start fewer servers, or place them elsewhere"
        found.append(Finding("memory", text, missing=None if need <= free else fix))
    return found


def gpu_bytes() -> list[int]:
    """Memory of each NVIDIA GPU of this host, as its driver says; empty without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * 2**20 for line in printed.split() if line.isdigit()]


def check_gpu_memory(
    placement: Placement, files: ModelFiles | None, memories: Sequence[int], host: str
) -> list[Finding]:
    """Whether a server's share of the smallest GPU of a host holds the model."""
    if not placement.gpus or not memories or files is None or files.num_bytes is None:
        return []
    need = _GPU_COPIES * files.num_bytes + _PROCESS_BYTES
    share = min(memories) * placement.gpus
    text = f"a server needs about {need / GIB:.1f} GiB of {placement.gpus:g} GPU on {host}, {share / GIB:.1f} there"
    return [Finding("GPU memory", text, missing=None if need <= share else f"GPU memory: {text}")]


def check_dashboard(url: str | None, state: AuthState) -> Finding:
    """Whether the dashboard, which runs any code it is sent, listens on the loopback interface only."""
    if url is None:
        return Finding(
            "dashboard",
            "none",
            advice="the cluster has no dashboard: `sdt cluster submit` and `status` need one",
        )
    host = url.removeprefix("http://").rpartition(":")[0].strip("[]")
    if host in ("localhost", "::1") or host.startswith("127."):
        return Finding("dashboard", f"{url}, loopback only")
    fix = f"a dashboard on loopback: it listens on {host}; start the head with --dashboard-host=127.0.0.1 (CVE-2023-48022)"
    return Finding("dashboard", url, **({"advice": fix} if state.usable else {"missing": fix}))


def check_node(node: Node) -> Finding:
    """A cluster node with its resources and labels."""
    resources = ", ".join(
        f"{node.resources[name]:g} {name}" for name in ("CPU", "GPU") if node.resources.get(name)
    )
    memory = f", {node.resources['memory'] / GIB:.1f} GiB" if node.resources.get("memory") else ""
    labels = ", ".join(
        f"{key}={value}" for key, value in sorted(node.labels.items()) if key != "ray.io/node-id"
    )
    text = f"{node.name}: {resources or 'no CPU'}{memory}; labels {labels or 'none'}"
    return Finding("node", text if node.alive else f"{node.name}: dead")
