"""Sending a `sdt` command to a cluster as a Ray job, and asking its dashboard what runs there.

See docs/architecture/fleet.md.

Works from outside the cluster, through its dashboard alone (an SSH tunnel suffices). It must not print tokens.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from sdt_dist.cluster.auth import auth_state, use_token
from sdt_dist.cluster.probe import is_this_host, probe
from sdt_dist.errors import ConfigurationError, FleetError, unknown_name
from sdt_dist.extras import packages_of

TUNNEL = "open a tunnel to the head: ssh -L 8265:127.0.0.1:8265 HEAD, or give the dashboard's URL with --address"
ATTACHING = ("evaluate", "tune", "doctor")  # commands that take --address
WRITING = ("evaluate", "train-forecaster", "train-flow", "tune")  # commands that write a directory
COMMANDS = ("evaluate", "train-forecaster", "train-flow", "tune", "report", "doctor")
_SAVED = "$HOME/sdt-results"


@dataclass(frozen=True)
class JobCommand:
    """A shell command for the head node, the job's id, and where on the head its results will lie."""

    entrypoint: str
    job_id: str
    output: str | None


def job_command(arguments: Sequence[str]) -> JobCommand:
    """What the head node runs for `sdt ARGUMENTS`; ConfigurationError for a command or output that cannot work there.

    A job's working directory is deleted with the job: a relative --output would be lost, so it is refused, and where
    none is given one below the head's home is used.
    """
    if not arguments or arguments[0] not in COMMANDS:
        raise unknown_name("command for a job", arguments[0] if arguments else "", COMMANDS)
    command = arguments[0]
    given = list(arguments)
    job_id = f"sdt-{command}-{uuid.uuid4().hex[:8]}"
    output = _option(given, "--output")
    if output is not None and not PurePosixPath(output).is_absolute():
        raise ConfigurationError(
            f"--output {output!r}: a job's results are written where it runs, and its working directory is deleted when it "
            "ends. Give an absolute path on the head node, better one that is shared (NFS), or leave --output out."
        )
    entrypoint = f"sdt {shlex.join(given)}"
    if command in ATTACHING and _option(given, "--address") is None:
        entrypoint += " --address auto"
    if command in WRITING and output is None:
        output = f"{_SAVED}/{job_id}"
        entrypoint += f' --output "{output}"'
    return JobCommand(entrypoint, job_id, output)


def submit_job(client: Any, job: JobCommand, working_dir: Path) -> None:
    """Send the working directory (without what .gitignore names) and start the job."""
    if not working_dir.is_dir():
        raise ConfigurationError(f"--working-dir: {working_dir} is no directory.")
    with _told("submitting the job"), quiet_ray():
        client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=job.job_id,
            runtime_env={"working_dir": str(working_dir)},
        )


def job_client(url: str) -> Any:
    """Ray's client for jobs; FleetError names what was tried and the fix."""
    with packages_of("cluster", "a job"):
        from ray.job_submission import JobSubmissionClient

    check_dashboard_url(url)
    with _told(f"connecting to {url}"):
        return JobSubmissionClient(url)


def dashboard_of(address: str, timeout_s: float = 20.0) -> str:
    """The dashboard's URL, of which this process may ask: a URL as it is, 'auto' or host:port by asking the head."""
    if "://" in address:
        return check_dashboard_url(address)
    facts = probe(address, timeout_s)
    if facts.dashboard_url is None:
        raise FleetError(
            f"cluster at {facts.address} has no dashboard; start its head with --include-dashboard=true."
        )
    return check_dashboard_url(facts.dashboard_url)


def check_dashboard_url(url: str, timeout_s: float = 10.0) -> str:
    """Whether something listens there; from now on Ray's clients in this process use this URL and, if local, the token."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ConfigurationError(
            f"address {url!r} is no dashboard URL such as http://127.0.0.1:8265. Fix: {TUNNEL}."
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 8265)
        socket.create_connection((parts.hostname, port), timeout=timeout_s).close()
    except (OSError, ValueError) as error:
        raise FleetError(f"no dashboard at {url} ({error}). Fix: {TUNNEL}.") from error
    if auth_state().source is not None and is_this_host(parts.hostname):
        use_token()
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray lets its variables win over arguments
    return url


def cluster_state(url: str, *, dead: bool = False) -> tuple[list[Any], list[Any]]:
    """(nodes, our named actors) of a cluster; actors that have died only on request."""
    with packages_of("cluster", "asking a cluster"):
        from ray.util.state import list_actors, list_nodes

    living = [] if dead else [("state", "!=", "DEAD")]
    with _told(f"asking {url}"):
        nodes = list_nodes(address=url, limit=10_000, timeout=20)
        actors = list_actors(address=url, limit=10_000, timeout=20, detail=True, filters=living)
    return nodes, [actor for actor in actors if (actor.name or "").startswith("sdt:")]


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option in a command line, None when it is not there."""
    for i, argument in enumerate(arguments):
        if argument == name:
            return arguments[i + 1] if i + 1 < len(arguments) else ""
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}=")
    return None


@contextmanager
def quiet_ray() -> Iterator[None]:
    """Without Ray's report of every file that it packs and every socket that it closes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Ray's refusals as a FleetError with the fix."""
    from ray.exceptions import AuthenticationError
    from ray.util.state.exception import RayStateApiException

    try:
        yield
    except AuthenticationError as error:
        state = auth_state()
        have = (
            f"a token is in {state.source}"
            if state.source
            else "copy the head's ~/.ray/auth_token here (mode 0600)"
        )
        raise FleetError(
            f"{what}: the token is missing or wrong (RAY_AUTH_MODE is {state.mode}). Fix: export RAY_AUTH_MODE=token; {have}."
        ) from error
    except (ConnectionError, RuntimeError, RayStateApiException, OSError) as error:
        first = " ".join(str(error).split())[:500]
        raise FleetError(f"{what} failed: {first}. Fix: {TUNNEL}.") from error
