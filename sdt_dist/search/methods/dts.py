"""`dts` and `dts_star`: Diffusion Tree Sampling on tokens (Jain et al. 2025, arXiv 2506.20701, algorithms 1 and 2).

A node draws children iid from p while draws < growth * visits^power; a draw that repeats a child adds to its
multiplicity and goes on from it; rollout states join the tree; values are backed up softly by weight.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from pydantic import Field, model_validator

from sdt_dist.protocols import Rollout, RolloutRequest
from sdt_dist.search.driver import Search
from sdt_dist.search.loop import Walk, grow, rollout_request
from sdt_dist.search.methods import Method
from sdt_dist.search.options import TreeOptions, ValueTreeOptions
from sdt_dist.search.session import Reply, Request, Session
from sdt_dist.search.walks import boltzmann_result, greedy_result
from sdt_dist.tree.kernels import list_children
from sdt_dist.tree.soft import (
    BOLTZMANN,
    UCT,
    backup_soft,
    descend_widening,
    weigh_horvitz_thompson,
    weigh_multiset,
)
from sdt_dist.tree.tree import Tree

WEIGHTS = {"horvitz_thompson": weigh_horvitz_thompson, "multiset": weigh_multiset}


class BlockOptions(ValueTreeOptions):
    """Options of trees that can branch at some depths only, where children are iid blocks of tokens."""

    block_size: int | None = Field(
        None, ge=1, description="tokens per block; default: every token is a node"
    )
    branch_depths: list[int] | None = Field(
        None, min_length=1, description="depths, besides 0, that may branch"
    )

    @property
    def in_blocks(self) -> bool:
        return self.block_size is not None or self.branch_depths is not None

    @model_validator(mode="after")
    def _one_way(self) -> BlockOptions:
        if self.block_size is not None and self.branch_depths is not None:
            raise ValueError("give block_size or branch_depths, not both")
        if any(depth < 0 for depth in self.branch_depths or ()):
            raise ValueError("branch_depths must be >= 0")
        if self.in_blocks and self.rollout_max_new_tokens is not None:
            raise ValueError(
                f"give rollout_max_new_tokens={self.rollout_max_new_tokens} or block_size/branch_depths, not both: it "
                "counts tokens, and walks in blocks stop at block ends only"
            )
        return self


class DtsOptions(BlockOptions):
    """Options of dts: the widening law C N^a and the weights of children."""

    growth: float = Field(2.0, gt=0, description="C of the widening law draws < C N^a")
    power: float = Field(0.8, gt=0, le=1, description="a of the widening law")
    weights: Literal["horvitz_thompson", "multiset"] | None = Field(
        None,
        description="weights of drawn children: 'horvitz_thompson' (tokens) or 'multiset' (blocks; the paper's own)",
    )

    @model_validator(mode="after")
    def _weights_of_blocks(self) -> DtsOptions:
        if self.in_blocks and self.weights == "horvitz_thompson":
            raise ValueError("children that are blocks have weights='multiset'")
        return self


class DtsStarOptions(DtsOptions):
    """Options of dts_star: dts with UCT selection."""

    c_uct: float = Field(
        1.0, ge=0, description="exploration constant of v + c sqrt(log N(s) / N(c))"
    )


class WideningRule:
    """Select among drawn children until a node is due another draw; that draw and what follows come from p.

    A node is due a draw while draws < growth * visits^power; `weights` is a key of WEIGHTS.
    """

    def __init__(
        self,
        options: TreeOptions,
        rule: int,
        exploration: float,
        growth: float,
        power: float,
        weights: str,
    ) -> None:
        self.options = options
        self._rule = rule
        self._exploration = exploration
        self._growth = growth
        self._power = power
        self._weigh = WEIGHTS[weights]

    def advance(self, session: Session, tree: Tree, walk: Walk) -> RolloutRequest | None:
        strength = self.options.inverse_temperature
        walk.node = descend_widening(
            tree.nodes,
            walk.node,
            walk.arm_key,
            strength,
            self._rule,
            self._exploration,
            self._growth,
            self._power,
        )
        if tree.is_terminal(walk.node):
            return None
        return rollout_request(
            session, tree, walk, 1 if self._may_stop_below(tree, walk.node) else None, fresh=False
        )

    def _may_stop_below(self, tree: Tree, node: int) -> bool:
        """Whether a child that a draw may repeat could be full, so that the walk must select there instead."""
        children = tree.nodes[list_children(tree.nodes, node)]
        allowed = self._growth * (children["visits"] + 1) ** self._power
        return bool((children["draws"] + 1 >= allowed).any())

    def attach(self, tree: Tree, start: int, rollout: Rollout, finished: bool) -> int:
        return tree.attach_rollout(start, rollout, finished)

    def record(self, tree: Tree, walks: list[Walk]) -> None:
        """Nothing to note: values carry the whole estimate."""

    def backup(self, tree: Tree, leaf: int) -> None:
        self._weigh(tree.nodes, leaf)
        backup_soft(tree.nodes, leaf, self.options.inverse_temperature)

    def is_exhausted(self, tree: Tree) -> bool:
        return False


def grow_widening(
    session: Session,
    options: BlockOptions,
    rule: int,
    exploration: float,
    growth: float,
    power: float,
    weights: str,
) -> Generator[list[Request], list[Reply], Tree]:
    """Grow the session's tree by widening, in blocks where the options say so."""
    if options.in_blocks:
        session.work_in_blocks(options.block_size, options.branch_depths)
    tree = session.start_tree()
    widening = WideningRule(options, rule, exploration, growth, power, weights)
    yield from grow(session, tree, widening, options.rollout_max_new_tokens)
    return tree


def _grow(
    session: Session, rule: int, exploration: float
) -> Generator[list[Request], list[Reply], Tree]:
    options = session.options
    assert isinstance(options, DtsOptions)
    weights = options.weights or ("multiset" if options.in_blocks else "horvitz_thompson")
    return (
        yield from grow_widening(
            session, options, rule, exploration, options.growth, options.power, weights
        )
    )


def run_dts(session: Session) -> Search:
    """Boltzmann selection; samples are tree walks."""
    tree = yield from _grow(session, BOLTZMANN, 0.0)
    return boltzmann_result(session, tree, "dts", exhausted=False)


def run_dts_star(session: Session) -> Search:
    """UCT selection; samples are the argmax walk by soft value, then the best."""
    assert isinstance(session.options, DtsStarOptions)
    tree = yield from _grow(session, UCT, session.options.c_uct)
    return greedy_result(session, tree, "dts_star", "value", exhausted=False)


METHODS = {
    "dts": Method("dts", DtsOptions, run_dts),
    "dts_star": Method("dts_star", DtsStarOptions, run_dts_star),
}
