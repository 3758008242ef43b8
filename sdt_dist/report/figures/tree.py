"""Figures of search trees: the most visited part of one tree, and value error against depth on toys.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdt_dist.evaluation.results import tree_path
from sdt_dist.models.toy import Toy
from sdt_dist.report.figures.axes import subplots
from sdt_dist.report.figures.run import Run
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.tree.tree import Tree


def draw_tree(
    tree: Tree, *, inverse_temperature: float, title: str = "tree", max_nodes: int = 150
) -> Figure:
    """Draw the `max_nodes` most visited nodes of a tree: width by visits, colour by soft value."""
    count = min(max_nodes, tree.size)
    nodes = tree.nodes[: tree.size]
    weight = nodes["visits"].astype(float)
    kept = set(np.argsort(-weight, kind="stable")[:count].tolist()) | {0}
    order = [
        node
        for node in _depth_first(tree)
        if node in kept and all(a in kept for a in _ancestors(tree, node))
    ]
    leaves = [node for node in order if not any(child in kept for child in tree.children(node))]
    height = {node: float(i) for i, node in enumerate(leaves)}
    for node in reversed(order):
        below = [height[child] for child in tree.children(node) if child in height]
        height.setdefault(node, float(np.mean(below)) if below else 0.0)
    figure, axes = subplots(figsize=(9, 5), dpi=150)
    for node in order[1:]:
        parent = int(nodes["parent"][node])
        ends = ([nodes["depth"][parent], nodes["depth"][node]], [height[parent], height[node]])
        axes.plot(
            *ends, color="#999999", linewidth=0.4 + 2.5 * weight[node] / max(weight[0], 1), zorder=1
        )
    soft = tree.soft_values(inverse_temperature)
    drawn = axes.scatter(
        [nodes["depth"][n] for n in order], [height[n] for n in order], c=[soft[n] for n in order], s=18, cmap="viridis",
        zorder=2,
    )  # fmt: skip
    figure.colorbar(drawn, ax=axes, label="soft value estimate")
    axes.set_xlabel("depth (tokens)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks([])
    axes.set_title(f"{title}: {len(order)} most visited of {tree.size} nodes")
    return figure


def _ancestors(tree: Tree, node: int) -> list[int]:
    found = []
    while node > 0:
        node = int(tree.nodes["parent"][node])
        found.append(node)
    return found


def _depth_first(tree: Tree) -> list[int]:
    order = []
    stack = [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += reversed(tree.children(node))
    return order


def value_error_by_depth(tree: Tree, toy: Toy, values: np.ndarray) -> dict[int, float]:
    """Mean |v - V| by depth over the nodes of a toy's tree that have an estimate; values [N] are the estimates."""
    errors: dict[int, list[float]] = {}
    for node in range(tree.size):
        if np.isfinite(values[node]):
            tokens = tree.tokens(node)
            exact = toy.soft_values[len(tokens)][toy.index(tokens)]
            errors.setdefault(len(tokens), []).append(abs(float(values[node] - exact)))
    return {depth: float(np.mean(found)) for depth, found in sorted(errors.items())}


def draw_value_error(curves: dict[str, dict[int, float]]) -> Figure:
    """Value error against depth, one curve a method."""
    figure, axes = subplots(figsize=(6, 3.8), dpi=150)
    for label, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), "o-", label=label)
    axes.set_xlabel("depth (tokens)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("mean |v - V| (lower is better)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def first_tree(run: Run, label: str | None = None) -> Figure | None:
    """The first problem's saved tree: of a label, else of the method shown as aligned or the first one that has a tree."""
    labels = [
        one
        for one in (label, run.aligned, *run.lines)
        if one and tree_path(run.directory, one).is_file()
    ]
    if not labels:
        return None
    saved = Snapshot.load(tree_path(run.directory, labels[0]))
    strength = saved.header["options"]["inverse_temperature"]
    return draw_tree(
        saved.tree, inverse_temperature=strength, title=f"{labels[0]} on {run.problems[0].name}"
    )
