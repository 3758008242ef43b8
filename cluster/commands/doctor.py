"""`sdt doctor`: versions, hardware, authentication, what a fleet would put where, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sdt_dist.actors.config import FleetConfig
    from sdt_dist.actors.placement import Node, PlacementPlan
    from sdt_dist.cluster.diagnosis import Finding


def doctor(
    address: Annotated[
        str | None, typer.Option(help="look at a cluster too: auto or HOST:PORT of its head")
    ] = None,
    model: Annotated[str, typer.Option(help="MODEL SPEC that the servers would load")] = "bundled",
    fleet: Annotated[
        str | None, typer.Option(help="YAML of a fleet: what would be placed where")
    ] = None,
) -> None:
    """Print versions, cores, memory, GPUs, authentication, the model, and what would run where.

    Ends with "ready", or with what is missing and exit code 1. Without --address it starts and contacts nothing.

    Examples:

      sdt doctor

      sdt doctor --address auto --fleet examples/fleet_gpu.yaml --model /models/llama
    """
    from sdt_dist.actors.config import load_fleet
    from sdt_dist.cluster.auth import auth_state
    from sdt_dist.cluster.diagnosis import check_auth, check_model

    config = load_fleet(fleet, {})
    num_gpus = _print_host()
    found = [check_auth(auth_state())]
    _show(found)
    if address is None:
        found += _show(_on_this_machine(config, model, num_gpus))
    else:
        found += _on_cluster(address, config, model, check_model(model)[0])
    _conclude(found)


def _print_host() -> int:
    """Versions and hardware of this machine; returns its number of GPUs."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    import psutil
    import torch

    from sdt_dist.models.forecaster.spec import forecaster_directory

    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("sdt-dist", "torch", "transformers", "ray", "numpy", "numba", "statsforecast"):
        try:
            print(f"{name:<12} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<12} missing")
    print(f"cores        {os.cpu_count()}, torch uses {torch.get_num_threads()}")
    memory = psutil.virtual_memory()
    print(f"memory       {memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs         {', '.join(gpus) or 'none'}")
    print(
        f"bundled      {'present' if forecaster_directory('bundled') else 'missing: reinstall the package'}"
    )
    folder = os.environ.get("SDT_DATA_DIR")
    state = (
        "not set: ETT and M4 are downloaded"
        if not folder
        else folder
        if Path(folder).is_dir()
        else f"{folder} missing"
    )
    print(f"SDT_DATA_DIR {state}")
    return len(gpus)


def _on_this_machine(config: FleetConfig, model: str, num_gpus: int) -> list[Finding]:
    """The fleet as local mode would start it here; a cluster's other groups have their models on nodes of their own."""
    import psutil

    from sdt_dist.cluster import diagnosis

    here = diagnosis.this_machine(config, num_gpus)
    is_local = config.address == "local"
    placed, plan = diagnosis.check_fleet(config, [here])
    if not is_local:
        advice = f"this fleet is for a cluster: look at that with --address {config.address}"
        placed.append(diagnosis.Finding("address", config.address, advice=advice))
    kinds = diagnosis.server_kinds(config, model)[: None if is_local else 1]
    checked = {kind: diagnosis.check_model(spec) for kind, spec, _ in kinds}
    files = {kind: found for kind, (_, found) in checked.items()}
    memory = diagnosis.check_memory(
        plan, files, {here.name: float(psutil.virtual_memory().available)}
    )
    for kind, _, placement in kinds:
        memory += diagnosis.check_gpu_memory(
            placement, files[kind], diagnosis.gpu_bytes(), here.name
        )
    return [*(finding for finding, _ in checked.values()), *placed, *memory]


def _on_cluster(address: str, config: FleetConfig, model: str, here: Finding) -> list[Finding]:
    """The fleet on a cluster; nodes are looked at from within when this host is one of them."""
    from sdt_dist.cluster.auth import auth_state
    from sdt_dist.cluster.diagnosis import Finding, check_dashboard, check_fleet, check_node
    from sdt_dist.cluster.probe import probe

    facts = probe(address, config.connect_timeout_s)
    versions = f"{facts.address}, Ray {facts.ray_version} on Python {facts.python_version}"
    found = _show(
        [Finding("cluster", versions), check_dashboard(facts.dashboard_url, auth_state())]
    )
    found += _show([check_node(node) for node in facts.nodes if node.alive])
    placed, plan = check_fleet(config, facts.nodes)
    found += _show(placed)
    if facts.local_node is None:
        fix = "a node of the cluster as the place to run from: this host is none; use `sdt cluster submit` from here"
        return found + _show([here, Finding("driver", "cannot run on this host", missing=fix)])
    return found + _show(_from_within(facts.address, config, facts.nodes, plan, model))


def _from_within(
    address: str, config: FleetConfig, nodes: tuple[Node, ...], plan: PlacementPlan, model: str
) -> list[Finding]:
    from sdt_dist.cluster.connect import connect
    from sdt_dist.cluster.diagnosis import check_gpu_memory, check_memory, server_kinds
    from sdt_dist.cluster.survey import survey

    found: list[Finding] = []
    kinds = server_kinds(config, model)

    def specs_of(node: Node) -> list[str]:
        """The models of all servers that Ray may start there."""
        return list(
            dict.fromkeys(spec for _, spec, placement in kinds if node.carries(placement.labels))
        )

    with connect(address, timeout_s=config.connect_timeout_s):
        for view in survey(nodes, specs_of):
            found += view.findings
            files = {kind: view.files.get(spec) for kind, spec, _ in kinds}
            if view.free_bytes is not None:
                found += check_memory(plan, files, {view.node: float(view.free_bytes)})
            for kind, _, placement in kinds:
                if view.node in plan.on(kind):
                    found += check_gpu_memory(placement, files[kind], view.gpus, view.node)
    return found


def _show(found: list[Finding]) -> list[Finding]:
    for finding in found:
        print(f"{finding.name:<12} {finding.text}")
    return found


def _conclude(found: list[Finding]) -> None:
    """Advice, then "ready" or what is missing with exit code 1."""
    for finding in found:
        if finding.advice:
            print(f"advice       {finding.advice}")
    missing = [finding.missing for finding in found if finding.missing]
    if not missing:
        print("ready")
        return
    print("missing:")
    for fix in missing:
        print(f"  - {fix}")
    raise typer.Exit(1)
