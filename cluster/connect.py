"""Starting Ray here or attaching to a cluster, within a deadline, with a message that names the fix.

See docs/architecture/fleet.md, docs/guides/evaluate.md#bad-input.

It knows of what runs on Ray how much room that asks for, and never prints a token.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.placement import check_placement, cluster_nodes, fleet_requests
from sdt_dist.cluster.auth import create_private_token
from sdt_dist.cluster.probe import OUTSIDE, ClusterFacts, check_address, check_answers, probe
from sdt_dist.errors import FleetError
from sdt_dist.extras import check_package, packages_of


def has_ray() -> bool:
    """Whether Ray is installed; nothing of it is imported."""
    return importlib.util.find_spec("ray") is not None


@dataclass(frozen=True)
class Connection:
    """An open connection; as a context manager it closes what it opened."""

    address: str
    namespace: str
    dashboard_url: str | None
    owned: bool = True

    def close(self) -> None:
        """Leave the cluster, or stop it if it was started here."""
        import ray

        if self.owned:
            ray.shutdown()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    address: str = "local",
    *,
    timeout_s: float = 20.0,
    namespace: str | None = None,
    num_cpus: float | None = None,
    dashboard: bool | None = None,
    runtime_env: dict[str, Any] | None = None,
) -> Connection:
    """Ray, ready to use: 'local' starts it on this machine, 'auto' or host:port attaches to a cluster.

    Namespace: one per run unless given. `num_cpus` and `dashboard` concern 'local' only (default: all cores, and a
    dashboard on 127.0.0.1 where Ray can start one). An initialised Ray is used as it is and left open.

    Raises ConfigurationError for an address that cannot be meant, FleetError when no usable cluster answers in time.
    """
    check_address(address)
    with packages_of("cluster", "a fleet"):
        import ray

    namespace = namespace or f"sdt-{uuid.uuid4().hex[:8]}"
    quiet = {
        "namespace": namespace,
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": runtime_env,
    }
    if ray.is_initialized():
        context = ray.get_runtime_context()
        return Connection(context.gcs_address, context.namespace, None, owned=False)
    if address == "local":
        create_private_token()
        started = ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            **quiet,
        )
    else:
        deadline = time.monotonic() + timeout_s
        facts = check_attachable(probe(address, timeout_s), deadline)
        os.environ.setdefault("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
        started = _attach(facts.address, quiet)
    url = started.dashboard_url
    return Connection(
        started.address_info["gcs_address"], namespace, f"http://{url}" if url else None
    )


@contextmanager
def attached(
    size: FleetConfig, say: Callable[[str], None], *, shards: bool = False
) -> Iterator[None]:
    """Ray with room for a fleet of this size for as long as the context lasts; `say` is told the dashboard's address.

    Errors as for `connect`, and ConfigurationError for a cluster that cannot hold the fleet.
    """
    from sdt_dist.cluster.dashboard import place_dashboard

    check_package("ray", "cluster", "a fleet")
    requests = fleet_requests(size, shards=shards)
    needed = sum(request.count * request.placement.cpus for request in requests) + 1
    num_cpus = max(os.cpu_count() or 1, math.ceil(needed))
    with connect(size.address, timeout_s=size.connect_timeout_s, num_cpus=num_cpus) as connection:
        check_placement(requests, cluster_nodes())
        if connection.dashboard_url:
            say(f"Ray dashboard: {connection.dashboard_url}")
        place_dashboard()
        yield


def check_attachable(facts: ClusterFacts, deadline: float) -> ClusterFacts:
    """Refuse other versions of Ray or Python, and a cluster without a live node on this host, which a driver needs.

    A node that is stuck must be found here: ray.init would hang on it, holding the GIL, and then end the process.
    """
    import ray

    python = platform.python_version()
    if facts.ray_version != ray.__version__ or _minor(facts.python_version) != _minor(python):
        raise FleetError(
            f"cluster at {facts.address} runs Ray {facts.ray_version} on Python {facts.python_version}, this is Ray "
            f"{ray.__version__} on Python {python}. Ray and Python X.Y must be equal: install the cluster's versions here, "
            "or run on one of its nodes."
        )
    if facts.local_node is None:
        raise FleetError(
            f"cluster at {facts.address} answers, but this host is none of its nodes "
            f"({', '.join(node.name for node in facts.nodes if node.alive) or 'none alive'}), and a driver needs one. "
            f"Fix: run this on such a node; {OUTSIDE}."
        )
    stuck = f"cluster at {facts.address} answers, but its node on this host ({facts.local_node}) does not. Fix: restart that node."
    check_answers(facts.local_node, deadline, missing=stuck, silent=stuck)
    return facts


def _attach(target: str, options: dict[str, Any]) -> Any:
    import ray

    try:
        return ray.init(address=target, **options)
    except (ConnectionError, RuntimeError) as error:
        raise FleetError(
            f"cluster at {target} answers, but Ray could not attach: {error}"
        ) from error


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
