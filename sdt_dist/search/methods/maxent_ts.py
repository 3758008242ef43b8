"""`maxent_ts`: maximum-entropy search over a tree of the top-k tokens with prior-weighted soft Bellman backups.

A node's first visit is a rollout from p; from its second on its k most probable tokens are children at once. With
tail="residual" the mass outside them is an arm that draws a NEW token, which joins with its exact p (SPEC 1).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdt_dist.protocols import ExpandRequest, RolloutRequest
from sdt_dist.search.driver import Search
from sdt_dist.search.loop import Walk, grow, rollout_request
from sdt_dist.search.methods import Method
from sdt_dist.search.options import TreeOptions
from sdt_dist.search.session import Session
from sdt_dist.search.soft import BOLTZMANN, PUCT, UCT, backup_enumerated, backup_mean, descend_enumerated, weigh_prior
from sdt_dist.search.tree import ENUMERATED, Tree
from sdt_dist.search.walks import boltzmann_result

SELECTION = {"boltzmann": BOLTZMANN, "uct": UCT, "puct": PUCT}


class EnumeratingOptions(TreeOptions):
    """Options of trees whose children are the most probable tokens."""

    expansion_k: int = Field(8, ge=1, description="tokens enumerated at a node")


class MaxEntOptions(EnumeratingOptions):
    """Options of maxent_ts."""

    selection: Literal["boltzmann", "uct"] = Field("boltzmann", description="rule that chooses among children")
    c_uct: float = Field(1.0, ge=0, description="exploration constant of UCT selection")


class EnumeratingRule:
    """Descend enumerated children; enumerate a node at its second visit; roll out from p below."""

    def __init__(self, options: EnumeratingOptions, rule: int, exploration: float, *, soft: bool) -> None:
        self.options, self._rule, self._exploration, self._soft = options, rule, exploration, soft

    def advance(self, session: Session, tree: Tree, walk: Walk) -> ExpandRequest | RolloutRequest | None:
        walk.node, residual = descend_enumerated(
            tree.nodes, walk.node, walk.arm_key, self.options.inverse_temperature, self._rule, self._exploration
        )
        if tree.is_terminal(walk.node):
            return None
        children = tree.child_tokens(walk.node)
        if residual or not children:
            return rollout_request(session, tree, walk, fresh=True)
        if len(children) >= self.options.expansion_k:
            tree.nodes["status"][walk.node] = ENUMERATED
            return self.advance(session, tree, walk)
        wanted = self.options.expansion_k - len(children)
        return ExpandRequest(session.root, tree.tokens(walk.node), wanted, None, children)

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
    tree, rule = Tree(), EnumeratingRule(options, SELECTION[options.selection], options.c_uct, soft=True)
    yield from grow(session, tree, rule)
    return boltzmann_result(session, tree, "maxent_ts", rule.is_exhausted(tree))


METHODS = {"maxent_ts": Method("maxent_ts", MaxEntOptions, run)}
