"""What answers at a cluster's address, asked before anything attaches: ray.init may hang, or only say "Failed to connect".

It must not attach a driver, and never prints a token.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sdt_dist.actors.placement import Node
from sdt_dist.cluster.auth import auth_state, use_token
from sdt_dist.errors import ConfigurationError, FleetError
from sdt_dist.extras import check_package

START = "start one with `ray start --head` (cluster/nodes/start_head.sh), or leave --address out to run on this machine"
OUTSIDE = "from outside send the run with `sdt cluster submit` through an SSH tunnel: ssh -L 8265:127.0.0.1:8265 HEAD"


_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS = b"\4"  # type of the first frame of every HTTP/2 server


@dataclass(frozen=True)
class ClusterFacts:
    """What a cluster says of itself before anybody attaches."""

    address: str
    ray_version: str
    python_version: str
    nodes: tuple[Node, ...]
    dashboard_url: str | None
    # host:port of a live node of the cluster on this host, which a driver needs
    local_node: str | None


def check_address(address: str, named_by: str = "address") -> None:
    """Refuse what cannot be an address of a cluster to attach to, with the reason."""
    if address in ("local", "auto"):
        return
    if address.startswith("ray://"):
        raise ConfigurationError(
            f"{named_by} {address!r}: Ray Client (ray://) is not supported: it relays every call through one proxy, a few "
            f"hundred a second. Allowed: local, auto, HOST:PORT on a node of the cluster; {OUTSIDE}."
        )
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(
            f"{named_by} {address!r} is none of: local, auto, HOST:PORT of Ray's head, such as 10.0.0.5:6379."
        )


def probe(address: str, timeout_s: float = 20.0) -> ClusterFacts:
    """What answers at an address ('auto' or host:port), without attaching; FleetError within the deadline otherwise."""
    check_address(address)
    check_package("ray", "cluster", "a Ray cluster")
    deadline = time.monotonic() + timeout_s
    target = resolve(address)
    check_answers(
        target,
        deadline,
        missing=f"no cluster at {target} (tried for at most {timeout_s:g} s). Fix: check host and port, {START}; {OUTSIDE}.",
        silent=f"no Ray at {target}, though something listens there. Fix: give the port of Ray's head (6379 unless it was "
        "set), not the dashboard's; if it is that port, restart the head, which is stuck.",
    )
    host = target.rpartition(":")[0]
    if auth_state().source is not None and (address == "auto" or is_this_host(host)):
        use_token()
    if auth_state().mode == "token" and auth_state().source is None:
        raise FleetError(
            f"cluster at {target}: RAY_AUTH_MODE=token, but there is no token here. Fix: copy the head's ~/.ray/auth_token "
            "to this user's ~/.ray/auth_token (mode 0600), or name it in RAY_AUTH_TOKEN_PATH."
        )
    return _within(deadline, timeout_s, target, lambda: _ask(target))


def resolve(address: str) -> str:
    """host:port of the cluster's head: 'auto' takes RAY_ADDRESS (set inside a job), then the Ray that runs on this host."""
    if address != "auto":
        return address
    named = os.environ.get("RAY_ADDRESS", "")
    if named and named != "auto":
        check_address(named, "RAY_ADDRESS")
        return named
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if found is None:
        raise FleetError(
            f"--address auto: no Ray runs on this host and RAY_ADDRESS is not set. Fix: {START}; {OUTSIDE}."
        )
    return found


def check_answers(target: str, deadline: float, missing: str, silent: str) -> None:
    """A gRPC server at host:port, or a FleetError: `missing` when nothing listens, `silent` when it is frozen or other."""
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection(
            (host.strip("[]"), int(port)), timeout=_left(deadline)
        ) as link:
            link.settimeout(_left(deadline))
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            link.sendall(_HTTP2_HELLO)
            first = link.recv(9)
    except TimeoutError as error:
        raise FleetError(f"{silent} It gave no answer in time.") from error
    except OSError as error:
        raise FleetError(f"{missing} The TCP connection failed: {error}.") from error
    if first[3:4] != _SETTINGS:
        raise FleetError(f"{silent} What it answered is not gRPC.")


def is_this_host(host: str) -> bool:
    """Whether a host name or address is one of this machine's own."""
    import psutil

    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return False
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return bool(found & own) or any(
        address.startswith("127.") or address == "::1" for address in found
    )


def _ask(target: str) -> ClusterFacts:
    """Versions, nodes and dashboard from the head's GCS. Ray has no public call that does not attach a driver."""
    from ray._raylet import GcsClient

    client = GcsClient(address=target)
    versions = json.loads(
        client.internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=5) or b"{}"
    )
    url = client.internal_kv_get(b"webui:url", b"dashboard", timeout=5)
    described = client.get_all_node_info(timeout=5)
    nodes = tuple(
        Node(
            name=info.node_manager_address,
            resources=dict(info.resources_total),
            labels=dict(info.labels),
            alive=info.state == 0,
            node_id=node_id.hex(),
        )
        for node_id, info in described.items()
    )
    local = (
        f"{info.node_manager_address}:{info.node_manager_port}"
        for info in described.values()
        if info.state == 0 and is_this_host(info.node_manager_address)
    )
    return ClusterFacts(
        address=target,
        ray_version=versions.get("ray_version", "unknown"),
        python_version=versions.get("python_version", "unknown"),
        nodes=nodes,
        dashboard_url=f"http://{url.decode()}" if url else None,
        local_node=next(local, None),
    )


def _within(
    deadline: float, timeout_s: float, target: str, ask: Callable[[], ClusterFacts]
) -> ClusterFacts:
    """The answer of a call that may hang inside Ray, or a FleetError at the deadline or for what Ray says."""
    from ray.exceptions import AuthenticationError

    answer: list[ClusterFacts | Exception] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:  # noqa: BLE001 - handed to the caller's thread
            answer.append(error)

    thread = threading.Thread(target=run, daemon=True, name="sdt-probe")
    with _native_stderr_silenced():
        thread.start()
        thread.join(_left(deadline))
    if not answer:
        raise FleetError(
            f"cluster at {target} accepts connections, but said nothing of itself within {timeout_s:g} s. Fix: restart its head."
        )
    if isinstance(answer[0], AuthenticationError):
        raise FleetError(_refused(target)) from answer[0]
    if isinstance(answer[0], Exception):
        raise FleetError(f"cluster at {target}: {answer[0]}") from answer[0]
    return answer[0]


def _refused(target: str) -> str:
    state = auth_state()
    if state.mode != "token":
        here = (
            f"a token is here ({state.source})"
            if state.source
            else "copy the head's ~/.ray/auth_token here (mode 0600)"
        )
        return f"cluster at {target} wants a token, and RAY_AUTH_MODE is {state.mode}. Fix: export RAY_AUTH_MODE=token; {here}."
    return f"cluster at {target} refused the token from {state.source}. Fix: give it the content of the head's ~/.ray/auth_token."


@contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    """Keep Ray's C++ warnings of a refused connection off the terminal: the error raised says the same."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())
