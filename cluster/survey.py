"""A look at every node of a cluster from within: one small task each (is the package there, the model, the memory).

It must not keep anything running, and asks for no resources, so that a busy cluster answers too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sdt_dist.actors.placement import Node
from sdt_dist.cluster.diagnosis import Finding, ModelFiles, check_model, gpu_bytes


@dataclass(frozen=True)
class NodeView:
    """What a node says of itself; `files` are those of every MODEL SPEC that it can read."""

    node: str
    findings: tuple[Finding, ...]
    free_bytes: int | None = None
    files: dict[str, ModelFiles] = field(default_factory=dict)
    gpus: tuple[int, ...] = ()


def look(node: str, specs: Sequence[str]) -> NodeView:
    """Runs on a node: free memory, the GPUs' memory, and the models as this host sees them."""
    import psutil

    checked = {spec: check_model(spec, node) for spec in specs}
    findings = tuple(finding for finding, _ in checked.values())
    files = {spec: found for spec, (_, found) in checked.items() if found is not None}
    return NodeView(node, findings, psutil.virtual_memory().available, files, tuple(gpu_bytes()))


def survey(
    nodes: Sequence[Node], specs_of: Callable[[Node], Sequence[str]], timeout_s: float = 120.0
) -> list[NodeView]:
    """What each live node says of the models that its servers would load.

    A node that fails or does not answer in time becomes a finding. Needs a connection.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    alive = [node for node in nodes if node.alive]
    calls = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote(node.name, list(specs_of(node)))
        for node in alive
    ]
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    views = []
    for node, call in zip(alive, calls, strict=True):
        try:
            views.append(ray.get(call, timeout=0 if call in done else 0.1))
        except GetTimeoutError:
            views.append(_unusable(node, f"no answer within {timeout_s:g} s"))
        except (RayError, ImportError) as error:
            first = (
                str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            )
            views.append(
                _unusable(node, f"cannot run sdt-dist ({first}); install the same sdt-dist there")
            )
    return views


def _unusable(node: Node, reason: str) -> NodeView:
    return NodeView(
        node.name, (Finding(f"node {node.name}", reason, missing=f"node {node.name}: {reason}"),)
    )
