"""`dts` and `dts_star`: Diffusion Tree Sampling on tokens (Jain et al. 2025, arXiv 2506.20701, algorithms 1 and 2).

A node draws children iid from p while draws < growth * visits^power; a draw that repeats a child adds to its
multiplicity and goes on from it; rollout states join the tree; values are backed up softly by weight.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdt_dist.protocols import RolloutRequest
from sdt_dist.search.driver import Search
from sdt_dist.search.kernels import list_children
from sdt_dist.search.loop import Walk, grow, rollout_request
from sdt_dist.search.methods import Method
from sdt_dist.search.options import TreeOptions
from sdt_dist.search.session import Session
from sdt_dist.search.soft import (
    BOLTZMANN,
    UCT,
    backup_soft,
    descend_widening,
    weigh_horvitz_thompson,
    weigh_multiset,
)
from sdt_dist.search.tree import Tree
from sdt_dist.search.walks import boltzmann_result, greedy_result

WEIGHTS = {"horvitz_thompson": weigh_horvitz_thompson, "multiset": weigh_multiset}


class DtsOptions(TreeOptions):
    """Options of dts: the widening law C N^a and the weights of children."""

    growth: float = Field(2.0, gt=0, description="C of the widening law draws < C N^a")
    power: float = Field(0.8, gt=0, le=1, description="a of the widening law")
    weights: Literal["horvitz_thompson", "multiset"] = Field(
        "horvitz_thompson", description="weights of drawn children; 'multiset' is the DTS paper's own"
    )


class DtsStarOptions(DtsOptions):
    """Options of dts_star: dts with UCT selection."""

    c_uct: float = Field(1.0, ge=0, description="exploration constant of v + c sqrt(log N(s) / N(c))")


class WideningRule:
    """Select among drawn children until a node is due another draw; that draw and what follows come from p."""

    def __init__(self, options: DtsOptions) -> None:
        self.options = options
        starred = isinstance(options, DtsStarOptions)
        self._rule, self._exploration = (UCT, options.c_uct) if starred else (BOLTZMANN, 0.0)
        self._weigh = WEIGHTS[options.weights]

    def advance(self, session: Session, tree: Tree, walk: Walk) -> RolloutRequest | None:
        o = self.options
        walk.node = descend_widening(
            tree.nodes, walk.node, walk.arm_key, o.inverse_temperature, self._rule, self._exploration, o.growth, o.power
        )
        if tree.is_terminal(walk.node):
            return None
        return rollout_request(session, tree, walk, 1 if self._may_stop_below(tree, walk.node) else None, fresh=False)

    def _may_stop_below(self, tree: Tree, node: int) -> bool:
        """Whether a child that a draw may repeat could be full, so that the walk must select there instead."""
        children = tree.nodes[list_children(tree.nodes, node)]
        allowed = self.options.growth * (children["visits"] + 1) ** self.options.power
        return bool((children["draws"] + 1 >= allowed).any())

    def record(self, tree: Tree, walks: list[Walk]) -> None:
        """Nothing to note: values carry the whole estimate."""

    def backup(self, tree: Tree, leaf: int) -> None:
        self._weigh(tree.nodes, leaf)
        backup_soft(tree.nodes, leaf, self.options.inverse_temperature)

    def is_exhausted(self, tree: Tree) -> bool:
        return False


def run_dts(session: Session) -> Search:
    """Boltzmann selection; samples are tree walks."""
    tree = Tree()
    yield from grow(session, tree, WideningRule(session.options))  # type: ignore[arg-type]
    return boltzmann_result(session, tree, "dts", exhausted=False)


def run_dts_star(session: Session) -> Search:
    """UCT selection; samples are the argmax walk by soft value, then the best."""
    tree = Tree()
    yield from grow(session, tree, WideningRule(session.options))  # type: ignore[arg-type]
    return greedy_result(session, tree, "dts_star", "value", exhausted=False)


METHODS = {
    "dts": Method("dts", DtsOptions, run_dts),
    "dts_star": Method("dts_star", DtsStarOptions, run_dts_star),
}
