"""Compiled selection and backup of value trees: Boltzmann, UCT and PUCT selection; soft and mean backups.

docs/concepts/target.md, "Tree estimate". A child's log-weight says what it stands for under the prior; a value that no
evaluation has reached yet is NaN, and reads as R, its parent's mean over evaluated children, never as 0.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sdt_dist.tree.kernels import uniform

BOLTZMANN, UCT, PUCT = 0, 1, 2
_TERMINAL, _ENUMERATED = 2, 1
_NO_ARM = -2


@njit(cache=True)
def descend_widening(nodes, node, key, inverse_temperature, rule, exploration, growth, power):
    """Go down until a node may draw another child (draws < growth * visits^power) or is terminal; its index.

    Visits are counted on the way, so that a wave's later walks see the earlier ones (DTS paper, algorithm 1).
    """
    while (
        nodes[node].status != _TERMINAL
        and nodes[node].draws >= growth * nodes[node].visits ** power
    ):
        node = _select(nodes, node, key, inverse_temperature, rule, exploration, False)
        nodes[node].visits += 1
    return node


@njit(cache=True)
def descend_enumerated(nodes, node, key, inverse_temperature, rule, exploration):
    """Go down enumerated nodes; returns (node, True) for a residual arm, (node, False) at any other stop.

    Other stops are terminal nodes and nodes whose children are not enumerated. Closed children (nothing left
    to explore below them) are no arms.
    """
    while nodes[node].status == _ENUMERATED:
        child = _select(nodes, node, key, inverse_temperature, rule, exploration, True)
        if child < 0:
            return node, True
        node = child
        nodes[node].visits += 1
    return node, False


@njit(cache=True, inline="always")
def _select(nodes, node, key, inverse_temperature, rule, exploration, skip_closed):
    if rule == BOLTZMANN:
        return _boltzmann(nodes, node, key, inverse_temperature, skip_closed)
    return _upper_bound(nodes, node, inverse_temperature, rule, exploration, skip_closed)


@njit(cache=True, inline="always")
def _arm(nodes, node, child, inverse_temperature):
    """Log of w_a exp(lambda v_a), an unvisited child valued at its node's R."""
    value = nodes[child].value
    return nodes[child].log_weight + (
        nodes[node].log_rate if np.isnan(value) else inverse_temperature * value
    )


@njit(cache=True)
def _boltzmann(nodes, node, key, inverse_temperature, skip_closed):
    """A child, or -1 for the residual arm, with probability proportional to w_a exp(lambda v_a)."""
    residual = -np.inf
    if skip_closed and nodes[node].num_remaining > 0:
        residual = nodes[node].log_residual + nodes[node].log_rate
    top, child = residual, nodes[node].first_child
    while child >= 0:
        if not (skip_closed and nodes[child].log_open == -np.inf):
            top = max(top, _arm(nodes, node, child, inverse_temperature))
        child = nodes[child].next_sibling
    total, child = np.exp(residual - top), nodes[node].first_child
    while child >= 0:
        if not (skip_closed and nodes[child].log_open == -np.inf):
            total += np.exp(_arm(nodes, node, child, inverse_temperature) - top)
        child = nodes[child].next_sibling
    target = uniform(key, nodes[node].depth) * total
    running = np.exp(residual - top)
    chosen = -1 if running > 0.0 else _NO_ARM
    child = nodes[node].first_child
    while child >= 0 and (chosen == _NO_ARM or running <= target):
        if not (skip_closed and nodes[child].log_open == -np.inf):
            running += np.exp(_arm(nodes, node, child, inverse_temperature) - top)
            chosen = child
        child = nodes[child].next_sibling
    return chosen


@njit(cache=True)
def _upper_bound(nodes, node, inverse_temperature, rule, exploration, skip_closed):
    """The child with the largest upper bound; -1 (residual arm) when every child is closed.

    UCT: v + c sqrt(log N(s) / N(c)) (Kocsis and Szepesvari 2006). PUCT: v + c p sqrt(N(s)) / (1 + N(c))
    (Silver et al. 2017). Unvisited children count as visited once in UCT.
    """
    best, best_score = -1, -np.inf
    child = nodes[node].first_child
    while child >= 0:
        if not (skip_closed and nodes[child].log_open == -np.inf):
            value = nodes[child].value
            if np.isnan(value):
                own = nodes[node].value
                value = own if np.isfinite(own) else nodes[node].log_rate / inverse_temperature
            if rule == UCT:
                bonus = np.sqrt(np.log(max(nodes[node].visits, 1)) / max(nodes[child].visits, 1))
            else:
                bonus = (
                    np.exp(nodes[child].log_prior)
                    * np.sqrt(nodes[node].visits)
                    / (1.0 + nodes[child].visits)
                )
            if value + exploration * bonus > best_score:
                best, best_score = child, value + exploration * bonus
        child = nodes[child].next_sibling
    return best


@njit(cache=True)
def backup_soft(nodes, leaf, inverse_temperature):
    """Weighted soft backup v = (1/lambda) [lse(log w + lambda v_a) - lse(log w)] up from `leaf`'s parent."""
    node = nodes[leaf].parent
    while node >= 0:
        top, top_w, child = -np.inf, -np.inf, nodes[node].first_child
        while child >= 0:
            if not np.isnan(nodes[child].value):
                top = max(top, nodes[child].log_weight + inverse_temperature * nodes[child].value)
                top_w = max(top_w, nodes[child].log_weight)
            child = nodes[child].next_sibling
        total, weight, child = 0.0, 0.0, nodes[node].first_child
        while child >= 0:
            if not np.isnan(nodes[child].value):
                total += np.exp(
                    nodes[child].log_weight + inverse_temperature * nodes[child].value - top
                )
                weight += np.exp(nodes[child].log_weight - top_w)
            child = nodes[child].next_sibling
        nodes[node].value = (top + np.log(total) - top_w - np.log(weight)) / inverse_temperature
        node = nodes[node].parent


@njit(cache=True)
def backup_enumerated(nodes, leaf, inverse_temperature):
    """Soft backup with a residual: evaluated children by weight, everything else of the node's mass at R.

    R is the mean of exp(lambda v) over evaluated children. Keeps log O beside it (nothing left: -inf).
    """
    node = nodes[leaf].parent
    while node >= 0:
        top, count, child = -np.inf, 0, nodes[node].first_child
        while child >= 0:
            if not np.isnan(nodes[child].value):
                top = max(top, inverse_temperature * nodes[child].value)
                count += 1
            child = nodes[child].next_sibling
        open_mass = np.exp(nodes[node].log_residual) if nodes[node].num_remaining > 0 else 0.0
        rest = open_mass
        total, covered, mean, child = 0.0, 0.0, 0.0, nodes[node].first_child
        while child >= 0:
            weight = np.exp(nodes[child].log_weight)
            open_mass += np.exp(nodes[child].log_prior + nodes[child].log_open)
            if np.isnan(nodes[child].value):
                rest += weight
            else:
                tilt = np.exp(inverse_temperature * nodes[child].value - top)
                total += weight * tilt
                covered += weight
                mean += tilt / count
            child = nodes[child].next_sibling
        nodes[node].log_rate = top + np.log(mean)
        nodes[node].value = (
            top + np.log(total + rest * mean) - np.log(covered + rest)
        ) / inverse_temperature
        nodes[node].log_open = np.log(open_mass) if open_mass > 0.0 else -np.inf
        node = nodes[node].parent


@njit(cache=True)
def backup_mean(nodes, leaf):
    """Mean backup: the visit-weighted mean of evaluated children; keeps log O beside it."""
    node = nodes[leaf].parent
    while node >= 0:
        open_mass = np.exp(nodes[node].log_residual) if nodes[node].num_remaining > 0 else 0.0
        total, visits, child = 0.0, 0, nodes[node].first_child
        while child >= 0:
            open_mass += np.exp(nodes[child].log_prior + nodes[child].log_open)
            if not np.isnan(nodes[child].value):
                total += nodes[child].visits * nodes[child].value
                visits += nodes[child].visits
            child = nodes[child].next_sibling
        nodes[node].value = total / visits
        nodes[node].log_open = np.log(open_mass) if open_mass > 0.0 else -np.inf
        node = nodes[node].parent


@njit(cache=True)
def weigh_prior(nodes, leaf):
    """Enumerated tokens: w = p(a|s), on the way from `leaf` to the root."""
    while leaf > 0:
        nodes[leaf].log_weight = nodes[leaf].log_prior
        leaf = nodes[leaf].parent


@njit(cache=True)
def weigh_multiset(nodes, leaf):
    """iid draws: w = multiplicity, for all children on the way from `leaf`'s parent to the root (DTS paper)."""
    node = nodes[leaf].parent
    while node >= 0:
        child = nodes[node].first_child
        while child >= 0:
            nodes[child].log_weight = np.log(nodes[child].multiplicity)
            child = nodes[child].next_sibling
        node = nodes[node].parent


@njit(cache=True)
def weigh_horvitz_thompson(nodes, leaf):
    """Distinct children of n iid draws: w = p / (1 - (1-p)^n), for all children on the way to the root."""
    node = nodes[leaf].parent
    while node >= 0:
        child = nodes[node].first_child
        while child >= 0:
            log_p = nodes[child].log_prior
            missed = np.exp(nodes[node].draws * np.log1p(-np.exp(min(log_p, 0.0))))
            nodes[child].log_weight = log_p - np.log1p(-missed)
            child = nodes[child].next_sibling
        node = nodes[node].parent


@njit(cache=True)
def finished_below(nodes, size):
    """Whether each node [N] is, or has below it, a finished sample that was evaluated."""
    alive = np.zeros(size, dtype=np.bool_)
    for node in range(size - 1, 0, -1):
        if nodes[node].status == _TERMINAL and not np.isnan(nodes[node].value):
            alive[node] = True
        if alive[node]:
            alive[nodes[node].parent] = True
    return alive


@njit(cache=True)
def walk_law(nodes, size, inverse_temperature):
    """log-probability [N] that a Boltzmann walk over children with a finished sample below reaches each node."""
    alive = finished_below(nodes, size)
    reach = np.full(size, -np.inf)
    top = np.full(size, -np.inf)
    total = np.zeros(size)
    for node in range(1, size):
        if alive[node]:
            arm = nodes[node].log_weight + inverse_temperature * nodes[node].value
            top[nodes[node].parent] = max(top[nodes[node].parent], arm)
    for node in range(1, size):
        if alive[node]:
            arm = nodes[node].log_weight + inverse_temperature * nodes[node].value
            total[nodes[node].parent] += np.exp(arm - top[nodes[node].parent])
    reach[0] = 0.0
    for node in range(1, size):
        parent = nodes[node].parent
        if alive[node]:
            arm = nodes[node].log_weight + inverse_temperature * nodes[node].value
            reach[node] = reach[parent] + arm - top[parent] - np.log(total[parent])
    return reach
