"""The search tree as one growing array of node records: what every tree method stores, and nothing of how it searches.

A node is a token prefix. 128 bytes a node; capacity grows by a third, so that a node costs at most 171 bytes.
Unknown rows are marked by num_remaining = -1. Masses are logs (docs/concepts/exactness.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from sdt_dist.protocols import Expansion, Rollout
from sdt_dist.tree.kernels import (
    add_child,
    attach,
    list_children,
    log_difference,
    path_tokens,
    prefix_log_priors,
)

NODE_DTYPE = np.dtype(
    [
        ("token", np.int32),
        ("parent", np.int32),
        ("first_child", np.int32),
        ("next_sibling", np.int32),
        ("depth", np.int32),
        ("visits", np.int32),  # walks that went through, counted when they are selected
        # iid draws made at the node (widening), or evaluations backed up (mean backup)
        ("draws", np.int32),
        ("multiplicity", np.int32),  # how often an iid draw at the parent gave this child
        # tokens with p > 0 outside the children; -1 while the row is unknown
        ("num_remaining", np.int32),
        ("status", np.int32),  # one of OPEN, ENUMERATED, TERMINAL
        ("log_prior", np.float64),  # log p(token | parent)
        ("log_residual", np.float64),  # log prior mass outside the children
        ("log_weight", np.float64),  # what the node stands for among its siblings
        # soft or mean estimate; the reward where finished, its partial form where cut
        ("value", np.float64),
        ("log_known", np.float64),  # log K: visited mass
        ("log_unknown", np.float64),  # log U: estimated unvisited mass
        ("log_open", np.float64),  # log O: unvisited prior mass
        # log R: estimate per unit of unexpanded mass, of q where there is a proposal
        ("log_rate", np.float64),
        ("log_proposal", np.float64),  # log q(token | parent); log p without a proposal
        # log mass of q outside the children; that of p without a proposal
        ("log_residual_proposal", np.float64),
        # a flow's log of q(token | parent) / p(token | parent); 0 without a flow
        ("log_advantage", np.float64),
    ]
)
OPEN = 0
ENUMERATED = 1
TERMINAL = 2
# by releases without proposals
_SAVED_AS = {
    "log_proposal": "log_prior",
    "log_residual_proposal": "log_residual",
}
_GROWTH = 4 / 3


class Tree:
    """Nodes [N] in creation order (parents before children); node 0 is the root."""

    def __init__(self, capacity: int = 256) -> None:
        self.nodes = np.zeros(capacity, dtype=NODE_DTYPE)
        self.size = 1
        root = self.nodes[0]
        root["token"], root["parent"], root["first_child"], root["next_sibling"] = -1, -1, -1, -1
        root["num_remaining"], root["log_known"], root["value"] = -1, -np.inf, np.nan

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Tree:
        """The tree that `arrays` came from."""
        tree = cls(len(arrays["token"]))
        tree.size = len(tree.nodes)
        for name in NODE_DTYPE.names or ():
            if name in arrays or name in _SAVED_AS:
                tree.nodes[name] = arrays[name if name in arrays else _SAVED_AS[name]]
        if "log_advantage" not in arrays:
            tree.nodes["log_advantage"] = tree.nodes["log_proposal"] - tree.nodes["log_prior"]
        return tree

    def reserve(self, extra: int) -> None:
        """Make room for `extra` more nodes."""
        needed = self.size + extra
        if needed > len(self.nodes):
            grown = np.zeros(max(needed, int(len(self.nodes) * _GROWTH)), dtype=NODE_DTYPE)
            grown[: self.size] = self.nodes[: self.size]
            self.nodes = grown

    def attach_rollout(
        self, start: int, rollout: Rollout, finished: bool, unit: Literal["p", "q"] = "q"
    ) -> int:
        """Join a rollout's states below `start`; returns the node reached, terminal when `finished`.

        unit: whether estimates of unexpanded mass are per unit of p, or of the proposal q that the rollout reports (if any).
        """
        self.reserve(len(rollout.tokens))
        log_q = rollout.log_prob if rollout.log_proposal is None else rollout.log_proposal
        has_proposal = unit == "q" and rollout.log_proposal is not None
        self.size, leaf = attach(
            self.nodes,
            self.size,
            start,
            rollout.tokens,
            rollout.log_prob,
            rollout.log_residual,
            rollout.num_remaining,
            log_q if has_proposal else rollout.log_prob,
            rollout.log_residual_proposal if has_proposal else rollout.log_residual,
            log_q,
        )
        if finished:
            self._close(leaf)
        return leaf

    def _close(self, leaf: int) -> None:
        record = self.nodes[leaf]
        record["status"], record["num_remaining"] = TERMINAL, 0
        record["log_residual"] = record["log_residual_proposal"] = -np.inf

    def attach_expansion(
        self,
        node: int,
        expansion: Expansion,
        known: tuple[int, ...],
        is_finished: Callable[[tuple[int, ...]], bool],
    ) -> None:
        """Add an expansion's children to `node`, whose row is then known and enumerated.

        `known` are the children's tokens when it was asked for; walks of the same wave may have added others since,
        or the same expansion: those keep their place and leave the residual by their own mass.
        """
        record = self.nodes[node]
        if record["status"] == ENUMERATED:
            return
        prefix = self.tokens(node)
        present = {
            int(self.nodes["token"][c]): float(self.nodes["log_prior"][c])
            for c in self.children(node)
        }
        arrived = {token: log_prob for token, log_prob in present.items() if token not in known}
        residual = expansion.log_residual
        remaining = expansion.num_remaining
        self.reserve(len(expansion.children))
        for token, log_prob in zip(
            expansion.children.tolist(), expansion.log_prob.tolist(), strict=True
        ):
            if arrived.pop(token, None) is None:
                self.size = add_child(self.nodes, self.size, node, token, log_prob)
                if is_finished((*prefix, token)):
                    self._close(self.size - 1)
        for log_prob in arrived.values():
            residual = log_difference(residual, log_prob)
            remaining = remaining - 1
        record = self.nodes[node]
        record["log_residual"] = record["log_residual_proposal"] = (
            residual if remaining > 0 else -np.inf
        )
        record["num_remaining"] = remaining
        record["status"] = ENUMERATED

    def tokens(self, node: int) -> tuple[int, ...]:
        """The generated tokens that lead to a node."""
        return tuple(path_tokens(self.nodes, node).tolist())

    def children(self, node: int) -> list[int]:
        """A node's children, oldest first."""
        return list_children(self.nodes, node).tolist()

    def child_tokens(self, node: int) -> tuple[int, ...]:
        """Tokens of a node's children, oldest first."""
        return tuple(self.nodes["token"][list_children(self.nodes, node)].tolist())

    def depth(self, node: int) -> int:
        return int(self.nodes["depth"][node])

    def is_terminal(self, node: int) -> bool:
        return bool(self.nodes["status"][node] == TERMINAL)

    def set_estimate(self, leaf: int, log_value: float) -> None:
        """A new open node's estimate U = R = exp(log_value), in place of the one that it inherits."""
        self.nodes["log_unknown"][leaf] = self.nodes["log_rate"][leaf] = log_value

    def set_reward(self, leaf: int, reward: float, inverse_temperature: float) -> None:
        """A terminal node's masses and value: K = exp(lambda r), U = O = 0, v = r."""
        record = self.nodes[leaf]
        record["value"], record["log_known"] = reward, inverse_temperature * reward
        record["log_unknown"] = record["log_open"] = record["log_rate"] = -np.inf

    def log_priors(self) -> np.ndarray:
        """log p(prefix) [N] of every node."""
        return prefix_log_priors(self.nodes, self.size)

    def soft_values(self, inverse_temperature: float) -> np.ndarray:
        """v [N]: the value where a method keeps one, else log M / lambda with M = K + U (docs/concepts/exactness.md); NaN where unknown."""
        nodes = self.nodes[: self.size]
        mass = np.logaddexp(nodes["log_known"], nodes["log_unknown"]) / inverse_temperature
        return np.where(np.isnan(nodes["value"]), mass, nodes["value"])

    def stats(self) -> dict[str, float]:
        """Nodes, max and mean depth, mean branching of inner nodes (docs/concepts/target.md#methods)."""
        nodes = self.nodes[: self.size]
        inner = np.bincount(nodes["parent"][1:], minlength=1) if self.size > 1 else np.zeros(1)
        inner = inner[inner > 0]
        return {
            "nodes": float(self.size),
            "depth_max": float(nodes["depth"].max()),
            "depth_mean": float(nodes["depth"].mean()),
            "branching_mean": float(inner.mean()) if len(inner) else 0.0,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The tree as named arrays [N], for np.savez: drawing, training, resuming."""
        return {name: self.nodes[name][: self.size].copy() for name in NODE_DTYPE.names or ()}
