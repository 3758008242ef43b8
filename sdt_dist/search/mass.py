"""Residual-mass tree sampling: compiled walk and backup of the exact visited and estimated unvisited masses.

SPEC section 1.1. Arms of a node s with expanded children E: prior arms p_c O_c and 1 - P_E, mass arms
p_c U_c and (1 - P_E) R. Along a walk both products of (arm probability / p_c) are tracked in logs.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sdt_dist.search.kernels import uniform

_OPEN_ROW = -1  # num_remaining of a node whose row nobody has computed


@njit(cache=True)
def walk_mass(nodes, key, epsilon):
    """One walk from the root to a residual arm. Returns (node, log a_m, log a_p).

    Uniform 0 decides between prior and mass arms for the whole walk; uniform 1 + depth chooses an arm.
    """
    prior_arms = uniform(key, 0) < epsilon
    node, log_am, log_ap = 0, 0.0, 0.0
    while nodes[node].num_remaining != _OPEN_ROW:
        total_m, total_p, top_m = _totals(nodes, node)
        choose_prior = prior_arms or total_m == 0.0
        target = uniform(key, 1 + nodes[node].depth) * (total_p if choose_prior else total_m)
        child, mass_m, mass_p = _choose(nodes, node, target, choose_prior, top_m)
        log_share = nodes[node].log_residual if child < 0 else nodes[child].log_prior
        log_ap += np.log(mass_p) - np.log(total_p) - log_share
        if total_m == 0.0:
            log_am += np.log(mass_p) - np.log(total_p) - log_share
        elif mass_m == 0.0:
            log_am = -np.inf
        else:
            log_am += np.log(mass_m) - np.log(total_m) - log_share
        if child < 0:
            break
        node = child
    return node, log_am, log_ap


@njit(cache=True, inline="always")
def _totals(nodes, node):
    """Sums of the mass arms (scaled by exp(-top)) and of the prior arms, and that top."""
    top = nodes[node].log_residual + nodes[node].log_rate
    child = nodes[node].first_child
    while child >= 0:
        top = max(top, nodes[child].log_prior + nodes[child].log_unknown)
        child = nodes[child].next_sibling
    total_p = np.exp(nodes[node].log_residual)
    total_m = 0.0 if top == -np.inf else np.exp(nodes[node].log_residual + nodes[node].log_rate - top)
    child = nodes[node].first_child
    while child >= 0:
        total_p += np.exp(nodes[child].log_prior + nodes[child].log_open)
        if top > -np.inf:
            total_m += np.exp(nodes[child].log_prior + nodes[child].log_unknown - top)
        child = nodes[child].next_sibling
    return total_m, total_p, top


@njit(cache=True, inline="always")
def _choose(nodes, node, target, choose_prior, top):
    """The arm where the running sum passes `target`: (child or -1 for the residual arm, mass arm, prior arm).

    The last arm with positive mass is taken when rounding leaves the target beyond the sum.
    """
    best, best_m, best_p, running = -2, 0.0, 0.0, 0.0
    if nodes[node].num_remaining > 0:
        best_p = np.exp(nodes[node].log_residual)
        best_m = 0.0 if top == -np.inf else np.exp(nodes[node].log_residual + nodes[node].log_rate - top)
        running = best_p if choose_prior else best_m
        if running > 0.0:
            best = -1
    child = nodes[node].first_child
    while child >= 0 and (best == -2 or running <= target):
        mass_p = np.exp(nodes[child].log_prior + nodes[child].log_open)
        mass_m = 0.0 if top == -np.inf else np.exp(nodes[child].log_prior + nodes[child].log_unknown - top)
        mass = mass_p if choose_prior else mass_m
        if mass > 0.0:
            best, best_m, best_p = child, mass_m, mass_p
            running += mass
        child = nodes[child].next_sibling
    return best, best_m, best_p


@njit(cache=True)
def backup_mass(nodes, leaf):
    """Recompute K, U, O and R on the way from `leaf`'s parent to the root, deepest first."""
    node = nodes[leaf].parent
    while node >= 0:
        _refresh(nodes, node)
        node = nodes[node].parent


@njit(cache=True, inline="always")
def _refresh(nodes, node):
    top_k, top_u, top_o, top_m, count = -np.inf, -np.inf, nodes[node].log_residual, -np.inf, 0
    child = nodes[node].first_child
    while child >= 0:
        log_p = nodes[child].log_prior
        top_k = max(top_k, log_p + nodes[child].log_known)
        top_u = max(top_u, log_p + nodes[child].log_unknown)
        top_o = max(top_o, log_p + nodes[child].log_open)
        top_m = max(top_m, max(nodes[child].log_known, nodes[child].log_unknown))
        count += 1
        child = nodes[child].next_sibling
    sum_k, sum_u, sum_o, sum_m = 0.0, 0.0, 0.0, 0.0
    child = nodes[node].first_child
    while child >= 0:
        log_p = nodes[child].log_prior
        if top_k > -np.inf:
            sum_k += np.exp(log_p + nodes[child].log_known - top_k)
        if top_u > -np.inf:
            sum_u += np.exp(log_p + nodes[child].log_unknown - top_u)
        if top_o > -np.inf:
            sum_o += np.exp(log_p + nodes[child].log_open - top_o)
        if top_m > -np.inf:
            sum_m += np.exp(nodes[child].log_known - top_m) + np.exp(nodes[child].log_unknown - top_m)
        child = nodes[child].next_sibling
    nodes[node].log_rate = top_m + np.log(sum_m / count) if top_m > -np.inf else -np.inf
    nodes[node].log_known = top_k + np.log(sum_k) if top_k > -np.inf else -np.inf
    if top_o > -np.inf:
        sum_o += np.exp(nodes[node].log_residual - top_o)
    nodes[node].log_open = top_o + np.log(sum_o) if top_o > -np.inf else -np.inf
    log_u = top_u + np.log(sum_u) if top_u > -np.inf else -np.inf
    if nodes[node].num_remaining > 0:
        log_u = np.logaddexp(log_u, nodes[node].log_residual + nodes[node].log_rate)
    nodes[node].log_unknown = log_u


@njit(cache=True)
def fall_mass(nodes, key):
    """One walk by total mass: child p_c (K_c + U_c), residual (1 - P_E) R; a terminal node or a residual's node."""
    node = 0
    while nodes[node].first_child >= 0:
        top = nodes[node].log_residual + nodes[node].log_rate
        child = nodes[node].first_child
        while child >= 0:
            top = max(top, nodes[child].log_prior + np.logaddexp(nodes[child].log_known, nodes[child].log_unknown))
            child = nodes[child].next_sibling
        residual = (
            np.exp(nodes[node].log_residual + nodes[node].log_rate - top) if nodes[node].num_remaining > 0 else 0.0
        )
        total = residual
        child = nodes[node].first_child
        while child >= 0:
            log_mass = np.logaddexp(nodes[child].log_known, nodes[child].log_unknown)
            total += np.exp(nodes[child].log_prior + log_mass - top)
            child = nodes[child].next_sibling
        target = uniform(key, nodes[node].depth) * total - residual
        if target < 0.0:
            break
        chosen = nodes[node].first_child
        child = chosen
        while child >= 0 and target >= 0.0:
            log_mass = np.logaddexp(nodes[child].log_known, nodes[child].log_unknown)
            target -= np.exp(nodes[child].log_prior + log_mass - top)
            chosen = child
            child = nodes[child].next_sibling
        node = chosen
    return node
