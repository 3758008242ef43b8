"""Whether a cluster can hold a fleet, said before anything starts: a label that no node carries waits silently in Ray.

A pure plan over node descriptions; it must not start, reserve or move anything. Ray decides for itself where an actor
goes; the plan only shows that a way exists, by greedy packing, or why none does.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sdt_dist.actors.config import FleetConfig, Placement
from sdt_dist.errors import ConfigurationError

_UNIQUE = ("ray.io/node-id",)  # labels that name one node: no use as a suggestion
_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_ROUNDING = 1e-6  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Node:
    """One node as Ray describes it; resources are totals, not what is free now."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    alive: bool = True
    node_id: str = ""

    def carries(self, labels: Mapping[str, str]) -> bool:
        """Whether every label is present with exactly that value."""
        return all(self.labels.get(key) == value for key, value in labels.items())


@dataclass(frozen=True)
class ActorRequest:
    """So many actors of one kind, each with the same wishes."""

    kind: str
    count: int
    placement: Placement

    @property
    def wants(self) -> dict[str, float]:
        """The Ray resources of one actor, those of amount 0 left out."""
        amounts = {"CPU": self.placement.cpus, "GPU": self.placement.gpus}
        return {name: amount for name, amount in amounts.items() if amount > 0}


@dataclass(frozen=True)
class Assignment:
    """`count` actors of a kind fit on a node."""

    kind: str
    count: int
    node: Node


@dataclass(frozen=True)
class Shortfall:
    """`count` actors of a kind fit nowhere, with the reason and the fix in one sentence."""

    kind: str
    count: int
    reason: str


@dataclass(frozen=True)
class PlacementPlan:
    """What fits where, and what does not fit."""

    placed: tuple[Assignment, ...]
    missing: tuple[Shortfall, ...]

    def on(self, kind: str) -> dict[str, int]:
        """Actors of one kind per node name."""
        counts = Counter[str]()
        for part in self.placed:
            counts[part.node.name] += part.count if part.kind == kind else 0
        return dict(+counts)

    def lines(self) -> list[str]:
        """The plan for a terminal, one line a node and kind, then what is missing."""
        placed = [f"{part.count} x {part.kind} on {part.node.name}" for part in self.placed]
        return placed + [f"{gap.count} x {gap.kind} nowhere: {gap.reason}" for gap in self.missing]


def fleet_requests(config: FleetConfig, *, shards: bool = False) -> list[ActorRequest]:
    """What a fleet asks for; store shards only when evidence is shared. What runs beside the driver is not planned."""
    requests = [
        ActorRequest("server", config.servers, config.server),
        *(ActorRequest(group.kind, group.count, group.placement) for group in config.more_servers),
        ActorRequest("searcher", config.searchers, config.searcher),
    ]
    return [*requests, ActorRequest("shard", config.shards, config.shard)] if shards else requests


def plan_placement(requests: Iterable[ActorRequest], nodes: Iterable[Node]) -> PlacementPlan:
    """Pack the most constrained kinds first, each actor on the fitting node that it leaves with least room."""
    alive = [node for node in nodes if node.alive]
    free = [dict(node.resources) for node in alive]
    placed: list[Assignment] = []
    missing: list[Shortfall] = []
    for request in sorted(requests, key=lambda request: _freedom(request, alive)):
        counts = _pack(request, alive, free)
        placed += [
            Assignment(request.kind, count, node)
            for count, node in zip(counts, alive, strict=True)
            if count
        ]
        if gap := request.count - sum(counts):
            missing.append(Shortfall(request.kind, gap, _reason(request, alive, free)))
    return PlacementPlan(tuple(placed), tuple(missing))


def check_placement(requests: Iterable[ActorRequest], nodes: Iterable[Node]) -> PlacementPlan:
    """The plan of a fleet that fits; ConfigurationError says in one message what does not fit, and why."""
    plan = plan_placement(requests, nodes)
    if plan.missing:
        gaps = "; ".join(f"{gap.count} x {gap.kind}: {gap.reason}" for gap in plan.missing)
        raise ConfigurationError(f"the cluster cannot hold this fleet. {gaps}")
    return plan


def cluster_nodes() -> list[Node]:
    """The nodes of the Ray cluster that this process is connected to, dead ones included."""
    import ray

    return [
        Node(
            name=described["NodeManagerAddress"],
            resources={
                name: float(amount) for name, amount in described.get("Resources", {}).items()
            },
            labels=dict(described.get("Labels", {})),
            alive=described["Alive"],
            node_id=described["NodeID"],
        )
        for described in ray.nodes()
    ]


def _freedom(request: ActorRequest, nodes: Sequence[Node]) -> tuple[float, ...]:
    """Sort key: few eligible nodes first, then many GPUs, then many CPUs."""
    eligible = sum(node.carries(request.placement.labels) for node in nodes)
    return eligible, -request.placement.gpus, -request.placement.cpus


def _pack(request: ActorRequest, nodes: Sequence[Node], free: list[dict[str, float]]) -> list[int]:
    """How many actors each node takes; `free` is used up accordingly. GPU nodes are kept for who needs them."""
    wants = request.wants
    counts = [0] * len(nodes)

    def room_left(i: int) -> tuple[float, float]:
        return (0.0 if "GPU" in wants else nodes[i].resources.get("GPU", 0.0)), free[i].get(
            "CPU", 0.0
        )

    eligible = [i for i, node in enumerate(nodes) if node.carries(request.placement.labels)]
    for i in sorted(eligible, key=room_left):
        most = [
            int((free[i].get(name, 0.0) + _ROUNDING) / amount) for name, amount in wants.items()
        ]
        counts[i] = min([request.count - sum(counts), *most])
        for name, amount in wants.items():
            free[i][name] = free[i].get(name, 0.0) - counts[i] * amount
    return counts


def _reason(
    request: ActorRequest, nodes: Sequence[Node], free: Sequence[Mapping[str, float]]
) -> str:
    """Why no node takes one more: the label that none carries, or the resource that is short."""
    if not nodes:
        return "the cluster has no live node; start one"
    for key, value in request.placement.labels.items():
        if not _VALUE.fullmatch(value):
            return f"label {key}={value!r} is no label value; allowed is one exact value such as {key}=model-server"
        if not any(node.carries({key: value}) for node in nodes):
            return _no_such_label(key, value, nodes)
    eligible = [i for i, node in enumerate(nodes) if node.carries(request.placement.labels)]
    labels = " and ".join(f"{key}={value}" for key, value in request.placement.labels.items())
    if not eligible:
        return f"no single node carries all of {labels}; label one with them"
    return _short_resource(
        request, [(nodes[i], free[i]) for i in eligible], f" with {labels}" if labels else ""
    )


def _no_such_label(key: str, value: str, nodes: Sequence[Node]) -> str:
    known = sorted(
        {f"{k}={v}" for node in nodes for k, v in node.labels.items() if k not in _UNIQUE}
    )
    close = difflib.get_close_matches(f"{key}={value}", known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    return (
        f"no live node carries label {key}={value}.{hint} Labels there: {', '.join(known) or 'none'}. "
        f"Start a node with `ray start --labels {key}={value}`, or change the label"
    )


def _short_resource(
    request: ActorRequest, eligible: list[tuple[Node, Mapping[str, float]]], labels: str
) -> str:
    """The first resource of which no eligible node has enough, in total or after the others were packed."""
    of_which = f"the {len(eligible)} live node{'s' if len(eligible) > 1 else ''}{labels}"
    for name, amount in request.wants.items():
        largest = max(node.resources.get(name, 0.0) for node, _ in eligible)
        if largest + _ROUNDING < amount:
            return f"each needs {amount:g} {name}, and the largest of {of_which} has {largest:g}; ask for less, or add a node"
    parts = []
    for name, amount in request.wants.items():
        total = sum(node.resources.get(name, 0.0) for node, _ in eligible)
        left = sum(max(0.0, rest.get(name, 0.0)) for _, rest in eligible)
        parts.append(f"{request.count * amount:g} {name} in all ({left:g} left of {total:g})")
    return f"{request.count} need {' and '.join(parts)} on {of_which}; start fewer, ask for less each, or add a node"
