"""`maxent_ts`: maximum-entropy search over a tree of the top-k tokens with prior-weighted soft Bellman backups.

A node's first visit is a rollout from p; from its second on its k most probable tokens are children at once. With
tail="residual" the mass outside them is an arm that draws a NEW token, which joins with its exact p (docs/concepts/target.md). With
tail="truncate" the target is the truncated prior: p itself must be cut to top_k = expansion_k, for rollouts too. Blocks
of tokens cannot be enumerated: there a node's children are expansion_k iid draws from p, weighted by multiplicity.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdt_dist.errors import ConfigurationError
from sdt_dist.protocols import ExpandRequest, Rollout, RolloutRequest
from sdt_dist.search.driver import Search
from sdt_dist.search.loop import Walk, grow, rollout_request
from sdt_dist.search.methods import Method
from sdt_dist.search.methods.dts import BlockOptions, grow_widening
from sdt_dist.search.options import TreeOptions
from sdt_dist.search.session import Session
from sdt_dist.search.walks import boltzmann_result
from sdt_dist.tree.soft import (
    BOLTZMANN,
    PUCT,
    UCT,
    backup_enumerated,
    backup_mean,
    descend_enumerated,
    weigh_prior,
)
from sdt_dist.tree.tree import ENUMERATED, Tree

SELECTION = {"boltzmann": BOLTZMANN, "uct": UCT, "puct": PUCT}


class MaxEntOptions(BlockOptions):
    """Options of maxent_ts."""

    expansion_k: int = Field(8, ge=1, description="tokens enumerated at a node")
    tail: Literal["residual", "truncate"] = Field(
        "residual",
        description="mass outside the top k: an arm that draws new tokens, or cut from p (top_k)",
    )
    selection: Literal["boltzmann", "uct"] = Field(
        "boltzmann", description="rule that chooses among children"
    )
    c_uct: float = Field(1.0, ge=0, description="exploration constant of UCT selection")


class EnumeratingRule:
    """Descend enumerated children; enumerate a node at its second visit; roll out from p below."""

    def __init__(
        self, options: TreeOptions, expansion_k: int, rule: int, exploration: float, *, soft: bool
    ) -> None:
        self.options, self._width, self._rule, self._exploration, self._soft = (
            options, expansion_k, rule, exploration, soft,
        )  # fmt: skip

    def advance(
        self, session: Session, tree: Tree, walk: Walk
    ) -> ExpandRequest | RolloutRequest | None:
        walk.node, residual = descend_enumerated(
            tree.nodes,
            walk.node,
            walk.arm_key,
            self.options.inverse_temperature,
            self._rule,
            self._exploration,
        )
        if tree.is_terminal(walk.node):
            return None
        children = tree.child_tokens(walk.node)
        if residual or not children:
            return rollout_request(session, tree, walk, fresh=True)
        if len(children) >= self._width:
            tree.nodes["status"][walk.node] = ENUMERATED
            return self.advance(session, tree, walk)
        return ExpandRequest(
            session.root, tree.tokens(walk.node), self._width - len(children), None, children
        )

    def attach(self, tree: Tree, start: int, rollout: Rollout, finished: bool) -> int:
        return tree.attach_rollout(start, rollout, finished)

    def record(self, tree: Tree, walks: list[Walk]) -> None:
        """Nothing to note: values carry the whole estimate."""

    def backup(self, tree: Tree, leaf: int) -> None:
        if self._soft:
            weigh_prior(tree.nodes, leaf)
            backup_enumerated(tree.nodes, leaf, self.options.inverse_temperature)
        else:
            backup_mean(tree.nodes, leaf)

    def is_exhausted(self, tree: Tree) -> bool:
        return bool(tree.nodes["log_open"][0] == float("-inf"))


def run(session: Session) -> Search:
    """Samples are tree walks over finished sequences."""
    options = session.options
    assert isinstance(options, MaxEntOptions)
    selection = SELECTION[options.selection]
    width = options.expansion_k
    if options.tail == "truncate":
        _check_truncation(session, width)
    if options.in_blocks:
        tree = yield from grow_widening(
            session, options, selection, options.c_uct, width, 0.0, "multiset"
        )
        return boltzmann_result(session, tree, "maxent_ts", exhausted=False)
    tree = session.start_tree()
    rule = EnumeratingRule(options, width, selection, options.c_uct, soft=True)
    yield from grow(session, tree, rule, options.rollout_max_new_tokens)
    return boltzmann_result(session, tree, "maxent_ts", rule.is_exhausted(tree))


def _check_truncation(session: Session, width: int) -> None:
    """Rollouts and expansions share one p (docs/concepts/target.md), so truncating the tail means top_k for the whole process."""
    top_k = session.states.top_k
    if top_k != width:
        raise ConfigurationError(
            f"tail: 'truncate' with expansion_k={width} searches the prior cut to its {width} most probable tokens, but "
            f"this prior has top_k={top_k}; pass top_k={width}, or tail='residual'."
        )


METHODS = {"maxent_ts": Method("maxent_ts", MaxEntOptions, run)}
