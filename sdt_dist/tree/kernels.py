"""Compiled primitives that all tree kernels share: uniforms, log-sums, finding and adding children."""

from __future__ import annotations

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
# log of the smallest positive float64: a mass that is lost to rounding, but not zero
TINY_LOG_MASS = -745.0


@njit(cache=True, inline="always")
def uniform(key, index):
    """`noise.uniform` compiled: uniform in (0, 1) number `index` of the stream `key` (uint64)."""
    x = key + np.uint64(index + 1) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    x = x ^ (x >> np.uint64(31))
    return (np.float64(x >> np.uint64(11)) + 0.5) / 9007199254740992.0


@njit(cache=True, inline="always")
def log_difference(a, b):
    """log(exp(a) - exp(b)) for b <= a; TINY_LOG_MASS where rounding leaves nothing."""
    if b >= a:
        return TINY_LOG_MASS
    return a + np.log1p(-np.exp(b - a))


@njit(cache=True)
def find_child(nodes, node, token):
    """The child of `node` with `token`, or -1."""
    child = nodes[node].first_child
    while child >= 0 and nodes[child].token != token:
        child = nodes[child].next_sibling
    return child


@njit(cache=True)
def add_child(nodes, size, node, token, log_prior):
    """Append a child that inherits its parent's R as its own estimate (docs/concepts/exactness.md); returns the new size."""
    nodes[size].token = token
    nodes[size].parent = node
    nodes[size].first_child = -1
    nodes[size].next_sibling = nodes[node].first_child
    nodes[node].first_child = size
    nodes[size].depth = nodes[node].depth + 1
    nodes[size].num_remaining = -1
    nodes[size].log_prior = nodes[size].log_proposal = log_prior
    nodes[size].log_weight = log_prior
    nodes[size].value = np.nan
    nodes[size].log_known = -np.inf
    nodes[size].log_unknown = nodes[node].log_rate
    nodes[size].log_rate = nodes[node].log_rate
    return size + 1


@njit(cache=True)
def propose(nodes, child, log_proposal):
    """Give a new child its log q: its estimate U = R is then its parent's R times q/p, the relative value by F."""
    nodes[child].log_proposal = log_proposal
    nodes[child].log_unknown += log_proposal - nodes[child].log_prior
    nodes[child].log_rate = nodes[child].log_unknown


@njit(cache=True)
def attach(
    nodes,
    size,
    start,
    tokens,
    log_prob,
    log_residual,
    num_remaining,
    log_proposal,
    log_residual_proposal,
    log_q,
):
    """Walk a rollout's tokens [n] down from `start`, adding what is missing; returns (size, last node).

    Every step counts as one draw at its node and one multiplicity of its child. A node's residuals (of p and of q) are
    the reply's own sums while nothing else joined since the request, and differences of such sums otherwise. log_q [n] is of
    the flow's q even where log_proposal, the law that estimates are per unit of, is p.
    """
    node = start
    for step in range(len(tokens)):
        child = find_child(nodes, node, tokens[step])
        nodes[node].draws += 1
        if child < 0:
            child = size
            size = add_child(nodes, size, node, tokens[step], log_prob[step])
            propose(nodes, child, log_proposal[step])
            nodes[child].log_advantage = log_q[step] - log_prob[step]
            known = nodes[node].num_remaining
            if known < 0 or (step == 0 and num_remaining[0] == known - 1):
                nodes[node].num_remaining = num_remaining[step]
                nodes[node].log_residual = log_residual[step]
                nodes[node].log_residual_proposal = max(log_residual_proposal[step], TINY_LOG_MASS)
            else:
                nodes[node].num_remaining = known - 1
                nodes[node].log_residual = log_difference(nodes[node].log_residual, log_prob[step])
                rest = log_difference(nodes[node].log_residual_proposal, log_proposal[step])
                nodes[node].log_residual_proposal = rest
            if nodes[node].num_remaining == 0:
                nodes[node].log_residual = nodes[node].log_residual_proposal = -np.inf
        nodes[child].multiplicity += 1
        node = child
    return size, node


@njit(cache=True)
def path_tokens(nodes, node):
    """Tokens [depth] int32 from the root to `node`."""
    tokens = np.empty(nodes[node].depth, dtype=np.int32)
    while node > 0:
        tokens[nodes[node].depth - 1] = nodes[node].token
        node = nodes[node].parent
    return tokens


@njit(cache=True)
def path_log_prior(nodes, node):
    """log p of the prefix that leads to `node`, summed from the root down."""
    steps = np.empty(nodes[node].depth)
    while node > 0:
        steps[nodes[node].depth - 1] = nodes[node].log_prior
        node = nodes[node].parent
    return steps.sum()


@njit(cache=True)
def path_log_ratio(nodes, node, above):
    """log of the product of q/p over the steps from `above` down to `node`; 0 without a proposal."""
    total = 0.0
    while node != above:
        total += nodes[node].log_proposal - nodes[node].log_prior
        node = nodes[node].parent
    return total


@njit(cache=True)
def list_children(nodes, node):
    """Indices [K] of a node's children, oldest first."""
    count, child = 0, nodes[node].first_child
    while child >= 0:
        count += 1
        child = nodes[child].next_sibling
    found = np.empty(count, dtype=np.int64)
    child = nodes[node].first_child
    while child >= 0:
        count -= 1
        found[count] = child
        child = nodes[child].next_sibling
    return found


@njit(cache=True)
def count_visits(nodes, node, above):
    """Count a walk through `node` and its ancestors below `above` (which was counted when it was selected)."""
    while node != above:
        nodes[node].visits += 1
        node = nodes[node].parent


@njit(cache=True)
def prefix_log_priors(nodes, size):
    """log p(prefix) [N] of every node."""
    total = np.zeros(size)
    for node in range(1, size):
        total[node] = total[nodes[node].parent] + nodes[node].log_prior
    return total
