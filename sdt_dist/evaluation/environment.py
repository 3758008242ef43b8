"""environment.json: on what a run was made; one entry for every kind of machine and version that worked on it.

See docs/guides/evaluate.md.

It holds no host names, addresses, paths or secrets. It loads no backend: GPUs are those that NVIDIA's driver lists.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from sdt_dist.errors import ResultsError
from sdt_dist.evaluation.evidence import model_identity
from sdt_dist.files import write_text
from sdt_dist.models.spec import split_spec

ENVIRONMENT = "environment.json"
_PACKAGES = (
    "sdt-dist", "numpy", "scipy", "numba", "torch", "transformers", "tokenizers", "ray", "vllm", "mlx", "mlx-lm",
    "scoringrules", "statsmodels", "pandas", "matplotlib",
)  # fmt: skip
_FIELDS = {"python", "system", "cpu", "cores", "memory_gib", "gpus", "packages", "servers"}


def server_record(model: str, count: int | None = None) -> dict[str, Any]:
    """What answers a run's requests: the backend, its weights' digest where it has files here, and how many servers.

    count: None where the run's own process answers.
    """
    backend = split_spec(model)[0]
    digest = None
    if backend not in ("http", "https"):
        digest = model_identity(model).partition(":")[2]
    is_digest = digest is not None and re.fullmatch(r"[0-9a-f]{32}", digest)
    return {"backend": backend, "weights": digest if is_digest else None, "count": count}


def describe(servers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """This machine, its Python and packages, and the servers of the run."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "servers": list(servers),
    }


def note_environment(directory: Path, servers: Sequence[dict[str, Any]]) -> None:
    """Add this environment to environment.json, unless it is there. ResultsError for a damaged file or a full disk."""
    known = read_environment(directory)
    now = describe(servers)
    if now not in known:
        write_text(directory / ENVIRONMENT, json.dumps([*known, now], indent=1))


def read_environment(directory: Path) -> list[dict[str, Any]]:
    """Every environment that worked on a run, in order; none where the run noted none. ResultsError for a damaged file."""
    path = directory / ENVIRONMENT
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"results: {path} is damaged ({error}); move the file away.") from error
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and e.keys() >= _FIELDS for e in entries
    ):
        raise ResultsError(
            f"results: {path} is none that `sdt evaluate` wrote; move the file away."
        )
    return entries


def backends_of(entries: Sequence[dict[str, Any]]) -> str:
    """The backends that answered a run, for people; a dash where it noted none."""
    return (
        ", ".join(
            dict.fromkeys(server["backend"] for entry in entries for server in entry["servers"])
        )
        or "–"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name, where Linux or a Mac says it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = re.findall(
            r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        return names[0] if names else platform.machine()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def _gpus() -> list[str]:
    return _output(
        "nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"
    ).splitlines()


def _output(*command: str) -> str:
    """What a small program prints; nothing where there is none or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def environment_facts(entry: dict[str, Any]) -> dict[str, str]:
    """An environment's facts by name, for people."""
    servers = [_server(server) for server in entry["servers"]]
    facts = {
        "model answered by": "; ".join(servers) or "–",
        "processor": f"{entry['cpu']}, {entry['cores']} cores, {entry['memory_gib']} GiB",
        "GPUs": ", ".join(entry["gpus"]) or "none",
        "system": f"{entry['system']}, Python {entry['python']}",
    }
    return facts | {name: str(found) for name, found in entry["packages"].items()}


def _server(server: dict[str, Any]) -> str:
    count = "" if server["count"] is None else f"{server['count']} × "
    weights = "" if server["weights"] is None else f" (weights {server['weights']})"
    return f"{count}{server['backend']}{weights}"
