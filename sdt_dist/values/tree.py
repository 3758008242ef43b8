"""A residual_ts tree as a pure function of a set of finished walks, under any lambda and multipliers.

See docs/concepts/exactness.md, docs/concepts/exactness.md#shared-evidence.

K, U, O and R are derived here from the walks' tokens, prior masses and reward terms, and never merged. It must not
know who made the walks, nor budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from sdt_dist.protocols import Rollout
from sdt_dist.tree.kernels import find_child
from sdt_dist.tree.mass import backup_mass
from sdt_dist.tree.tree import Tree
from sdt_dist.values.join import join_walk, path_facts
from sdt_dist.values.records import WalkRecord, reward_of

Steps = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class EvidenceTree:
    """Walks joined to one tree; `known` is their version vector, `walks` the walks in the order they came."""

    def __init__(self, inverse_temperature: float, multipliers: Mapping[str, float]) -> None:
        self.inverse_temperature = inverse_temperature
        self.multipliers = dict(multipliers)
        self.tree = Tree()
        self.walks: list[WalkRecord] = []
        self.known: dict[str, int] = {}
        self._outside = np.full(len(self.tree.nodes), np.nan)
        self._support = np.zeros(len(self.tree.nodes), dtype=np.int32)

    @property
    def is_exhausted(self) -> bool:
        """Whether every sequence with p > 0 has been found."""
        return bool(self.tree.nodes["log_open"][0] == -np.inf)

    def join(self, walks: Iterable[WalkRecord]) -> None:
        """Add walks, each after its stream's earlier ones; known ones change nothing. ConfigurationError for terms.

        Rewards are recomputed from the walks' components; masses are backed up once all have joined.
        """
        tree = self.tree
        leaves = []
        for walk in walks:
            count = self.known.get(walk.stream, 0)
            if walk.number < count:
                continue
            assert walk.number == count, "a stream's walks join in order"
            reward = reward_of(walk.components, self.multipliers)
            self._reserve(len(walk.tokens))
            tree.size, leaf = join_walk(
                tree.nodes,
                self._outside,
                self._support,
                tree.size,
                *map(np.array, (walk.tokens, walk.log_prob, walk.log_outside, walk.support)),
            )  # fmt: skip; copies, because arrays from another process may be read-only, which is another type
            tree.set_reward(leaf, reward, self.inverse_temperature)
            self.known[walk.stream] = count + 1
            self.walks.append(walk)
            leaves.append(leaf)
        for leaf in leaves:
            backup_mass(tree.nodes, leaf)

    def steps(self, node: int, excluded: Iterable[int], rollout: Rollout) -> Steps:
        """(tokens, log_prob, log_outside, support) [n] of the sequence that a rollout from `node` finished.

        `excluded` are the tokens that its first step could not draw; their mass is outside of it too.
        """
        tree = self.tree
        children = [find_child(tree.nodes, node, token) for token in excluded]
        log_outside = rollout.log_residual.copy()
        support = rollout.num_remaining.astype(np.int32) + 1
        log_outside[0] = np.logaddexp.reduce(
            [log_outside[0], *np.sort(tree.nodes["log_prior"][children])]
        )
        support[0] += len(children)
        above = path_facts(tree.nodes, self._outside, self._support, node)
        tokens = np.concatenate([np.array(tree.tokens(node), dtype=np.int32), rollout.tokens])
        below = (rollout.log_prob, log_outside, support)
        return tokens, *(np.concatenate(pair) for pair in zip(above, below, strict=True))  # type: ignore[return-value]

    def soft_value(self, prefix: tuple[int, ...]) -> float:
        """v = (1/lambda) log M of a prefix; outside the tree (1/lambda) log R of its deepest ancestor there."""
        nodes = self.tree.nodes
        node = 0
        for token in prefix:
            child = find_child(nodes, node, token)
            if child < 0:
                return float(nodes["log_rate"][node]) / self.inverse_temperature
            node = int(child)
        record = nodes[node]
        return (
            float(np.logaddexp(record["log_known"], record["log_unknown"]))
            / self.inverse_temperature
        )

    def _reserve(self, extra: int) -> None:
        self.tree.reserve(extra)
        missing = len(self.tree.nodes) - len(self._outside)
        if missing:
            self._outside = np.append(self._outside, np.full(missing, np.nan))
            self._support = np.append(self._support, np.zeros(missing, dtype=np.int32))
