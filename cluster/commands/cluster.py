"""`sdt cluster`: send a command to a cluster as a job, and see what of ours runs there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DASHBOARD = "http://127.0.0.1:8265"


def submit(
    command: Annotated[list[str], typer.Argument(help="after --: the sdt command to run there")],
    address: Annotated[
        str, typer.Option(help="dashboard URL", envvar="RAY_API_SERVER_ADDRESS")
    ] = DASHBOARD,
    working_dir: Annotated[
        Path, typer.Option(help="sent along, without what .gitignore names")
    ] = Path("."),
    wait: Annotated[bool, typer.Option(help="print what the job prints until it ends")] = True,
) -> None:
    """Run a sdt command on a cluster as a Ray job; adds `--address auto` for you.

    Results are written by the job, so they lie on the head node: below ~/sdt-results unless --output names an absolute
    path, best a shared one. Ctrl-C leaves the job running. From outside, open a tunnel first and export
    RAY_AUTH_MODE=token.

    Examples:

      ssh -N -L 8265:127.0.0.1:8265 HEAD &

      sdt cluster submit -- evaluate --dataset my.csv --methods snis,residual_ts --output /shared/run1

      sdt cluster submit --no-wait -- evaluate config.yaml --output /shared/run1 --resume
    """
    import asyncio

    from sdt_dist.cluster.jobs import job_client, job_command, submit_job

    job = job_command(command)
    client = job_client(address)
    submit_job(client, job, working_dir)
    print(f"job {job.job_id}: {job.entrypoint}")
    if job.output is not None:
        print(f"results: {job.output} on the head node")
    print(f"dashboard: {address}/#/jobs; to stop it: ray job stop {job.job_id} --address {address}")
    if wait:
        asyncio.run(_follow(client, job.job_id))


def status(
    address: Annotated[
        str, typer.Option(help="auto, HOST:PORT of the head, or the dashboard's URL")
    ] = "auto",
    dead: Annotated[bool, typer.Option("--dead", help="list actors that have died, too")] = False,
) -> None:
    """Show a cluster's nodes with their labels, and the actors of every sdt run with their states.

    Examples:

      sdt cluster status

      sdt cluster status --address http://127.0.0.1:8265
    """
    from sdt_dist.cluster.jobs import cluster_state, dashboard_of

    url = dashboard_of(address)
    nodes, actors = cluster_state(url, dead=dead)
    print(f"dashboard {url}\n\nnodes")
    for node in nodes:
        print(f"  {_node_line(node)}")
    places = {node.node_id: node.node_ip for node in nodes}
    for run in sorted({actor.ray_namespace for actor in actors}):
        print(f"\nrun {run}")
        for actor in sorted(
            (a for a in actors if a.ray_namespace == run), key=lambda actor: actor.name
        ):
            print(f"  {_actor_line(actor, places)}")
    if not actors:
        print("\nno actor of sdt is running")


def _node_line(node: Any) -> str:
    amounts = ", ".join(
        f"{node.resources_total[name]:g} {name}"
        for name in ("CPU", "GPU")
        if name in node.resources_total
    )
    labels = ", ".join(
        f"{key}={value}" for key, value in sorted(node.labels.items()) if key != "ray.io/node-id"
    )
    role = " (head)" if node.is_head_node else ""
    return (
        f"{node.node_ip:<15} {node.state:<6} {amounts or 'no CPU'}; labels {labels or 'none'}{role}"
    )


def _actor_line(actor: Any, places: dict[str, str]) -> str:
    line = f"{actor.name:<24} {actor.state:<18}"
    if actor.state == "ALIVE":
        return f"{line} on {places.get(actor.node_id, 'an unknown node')}, pid {actor.pid}"
    if actor.state == "DEAD":
        return f"{line} {_reason(actor)}".rstrip()
    wants = [f"{amount:g} {name}" for name, amount in (actor.required_resources or {}).items()]
    wants += [f"{key}={value}" for key, value in (actor.label_selector or {}).items()]
    return f"{line} wants {', '.join(wants) or 'nothing'}"


def _reason(actor: Any) -> str:
    cause = actor.death_cause or {}
    text = next(
        (part.get("error_message", "") for part in cause.values() if isinstance(part, dict)), ""
    )
    return " ".join(str(text).split())[:120]


async def _follow(client: Any, job_id: str) -> None:
    """Print the job's log; exit code 1 when it failed."""
    from sdt_dist.cluster.jobs import quiet_ray

    with quiet_ray():
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)
    state = client.get_job_status(job_id)
    print(f"job {job_id}: {state.value.lower()}")
    if state.value != "SUCCEEDED":
        raise typer.Exit(1)
