"""Compiled joining of a finished walk to a tree so that the tree depends on the set of walks only.

See docs/concepts/exactness.md#shared-evidence.

Children are kept in the order of their tokens, and every mass comes from canonical facts: the smallest log p and
log mass outside of all walks that took a step (they differ in the last bits at most, on backends that round).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sdt_dist.tree.kernels import TINY_LOG_MASS, add_child, find_child, log_difference
from sdt_dist.tree.tree import TERMINAL


@njit(cache=True)
def join_walk(nodes, outside, support, size, tokens, log_prob, log_outside, supports):
    """Walk a finished sequence [n] down from the root, adding what is missing; returns (size, leaf).

    outside [N]: log prior mass outside a node's token in its parent's row; support [N]: tokens with p > 0 in a
    node's own row. `nodes` must have room for n more.
    """
    node = 0
    nodes[0].visits += 1
    for step in range(len(tokens)):
        child = find_child(nodes, node, tokens[step])
        changed = child < 0
        if child < 0:
            child = size
            size = add_child(nodes, size, node, tokens[step], log_prob[step])
            _into_order(nodes, node)
            outside[child] = log_outside[step]
        elif log_outside[step] < outside[child] or log_prob[step] < nodes[child].log_prior:
            changed = True
            outside[child] = min(outside[child], log_outside[step])
            nodes[child].log_prior = min(nodes[child].log_prior, log_prob[step])
            nodes[child].log_weight = nodes[child].log_proposal = nodes[child].log_prior
        if changed or supports[step] > support[node]:
            support[node] = max(support[node], supports[step])
            _refresh_residual(nodes, outside, support, node)
        nodes[child].visits += 1
        node = child
    nodes[node].status = TERMINAL
    nodes[node].num_remaining = 0
    nodes[node].log_residual = nodes[node].log_residual_proposal = -np.inf
    return size, node


@njit(cache=True, inline="always")
def _into_order(nodes, node):
    """Move the first child, which is new, to its place among children ordered by token."""
    new = nodes[node].first_child
    after = nodes[new].next_sibling
    if after < 0 or nodes[after].token > nodes[new].token:
        return
    nodes[node].first_child = after
    while (
        nodes[after].next_sibling >= 0 and nodes[nodes[after].next_sibling].token < nodes[new].token
    ):
        after = nodes[after].next_sibling
    nodes[new].next_sibling = nodes[after].next_sibling
    nodes[after].next_sibling = new


@njit(cache=True, inline="always")
def _refresh_residual(nodes, outside, support, node):
    """1 - P_E as the mass outside the most probable child, minus the other children: the least cancellation."""
    base = np.inf
    count = 0
    largest = -1
    child = nodes[node].first_child
    while child >= 0:
        count += 1
        if outside[child] < base:
            base = outside[child]
            largest = child
        child = nodes[child].next_sibling
    others = 0.0
    child = nodes[node].first_child
    while child >= 0:
        if child != largest:
            others += np.exp(nodes[child].log_prior - base)
        child = nodes[child].next_sibling
    residual = base + log_difference(0.0, np.log(others)) if others > 0.0 else base
    remaining = max(support[node] - count, 0)
    nodes[node].num_remaining = remaining
    nodes[node].log_residual = max(residual, TINY_LOG_MASS) if remaining > 0 else -np.inf
    nodes[node].log_residual_proposal = nodes[node].log_residual


@njit(cache=True)
def path_facts(nodes, outside, support, node):
    """(log p, log mass outside, support) [depth] of the steps from the root to `node`."""
    depth = nodes[node].depth
    log_prob = np.empty(depth)
    log_outside = np.empty(depth)
    supports = np.empty(depth, dtype=np.int32)
    while node > 0:
        step = nodes[node].depth - 1
        log_prob[step], log_outside[step] = nodes[node].log_prior, outside[node]
        node = nodes[node].parent
        supports[step] = support[node]
    return log_prob, log_outside, supports


@njit(cache=True)
def outside_masses(nodes, size):
    """outside [N] and support [N] of any token tree: the residual plus the siblings, a sum without cancellation."""
    outside = np.full(size, np.nan)
    support = np.zeros(size, dtype=np.int32)
    for node in range(size):
        count = 0
        child = nodes[node].first_child
        while child >= 0:
            count += 1
            total = nodes[node].log_residual if nodes[node].num_remaining > 0 else -np.inf
            other = nodes[node].first_child
            while other >= 0:
                if other != child:
                    total = np.logaddexp(total, nodes[other].log_prior)
                other = nodes[other].next_sibling
            outside[child] = total
            child = nodes[child].next_sibling
        support[node] = count + max(nodes[node].num_remaining, 0)
    return outside, support
