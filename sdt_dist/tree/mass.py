"""Residual-mass tree sampling: compiled walk and backup of the exact visited and estimated unvisited masses.

docs/concepts/exactness.md, docs/concepts/flow.md#proposal. Arms of a node s with expanded children E: prior arms p_c O_c and 1 - P_E, mass arms
p_c U_c and (1 - Q_E) R, where R = mean over E of (K_c + U_c) p_c/q_c estimates the unexpanded mass per unit of q. Without
a proposal q is p, and log q has the bits of log p. Along a walk both products of (arm probability / p_c) are tracked in
logs.

Why estimates stay exact. A sequence x outside the tree is reached by one path of arms only: down to the node where it
leaves the tree, through that node's residual arm, by a token a outside E and a rollout. A prior walk draws a and the
rollout from p, a mass walk from q, so that x has the probabilities

    p(x) a_p,   a_p = prod_c (prior arm of c)/p_c * (residual prior arm)/(1 - P_E)
    p(x) a_m,   a_m = prod_c (mass arm of c)/p_c * (residual mass arm)/(1 - Q_E) * prod_t q_t/p_t,

the last product over a and the rollout's tokens. Which law is drawn is decided once for the whole walk, with probability
epsilon, so x has the law p(x) (epsilon a_p + (1 - epsilon) a_m) and omega = 1/(epsilon a_p + (1 - epsilon) a_m) makes
E[omega E(x)] = sum over x outside S of p(x) E(x), whatever F, the tree and the other walks of the wave are: a_p > 0 for
every such x because its prior arms are. Hence E[t] = Z. Both factors are needed whichever law the walk drew from.

Selection mix (docs/concepts/flow.md#selection-mix). Mass arms that mix U with a flow's F in a share a(s) are, up to the factor norm(s)^a that
all arms of s have in common, norm(s) = sum_b p_b exp(lambda F(s b)),

    child c: p_c U_c^(1-a) (A_c O_c)^a,   A_c = exp(lambda F_c) / norm(s) = q_c / p_c,   residual: (1 - Q_E) R^(1-a),

where R and the residual are of the law that mass walks draw from, p without a proposal. The argument above asks of arms only
that they depend on the tree as the walk saw it: a_m has the arms that were used, so E[t] = Z for any a(s), constant or not.
An arm with U_c = 0 stays 0: rounding apart it has O_c = 0, and otherwise prior walks still reach it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sdt_dist.tree.kernels import uniform

_OPEN_ROW = -1  # num_remaining of a node whose row nobody has computed


@njit(cache=True)
def walk_mass(
    nodes,  # [N] records of the tree
    key,  # uint64, the walk's noise
    epsilon,  # how often a walk takes prior arms
    alpha=0.0,  # F's share in mass arms before the first visit
    decay=0.0,  # how fast that share falls with visits
    num_walks=0,  # walks before this wave
):
    """One walk from the root to a residual arm. Returns (node, log a_m, log a_p, whether it is a prior walk).

    F's share in the mass arms of a node with N walks before this wave is alpha / (1 + decay N); N(root) is `num_walks`, because
    the root's own count has this wave's walks in it. log a_m lacks the product of q/p over the tokens drawn, which are from p
    in a prior walk and from q otherwise. Uniform 0 decides between prior and mass arms for the whole walk; uniform 1 + depth
    chooses an arm.
    """
    # 1. One law for the whole walk: prior arms with probability epsilon.
    prior_arms = uniform(key, 0) < epsilon
    node = 0
    log_am = 0.0
    log_ap = 0.0
    while nodes[node].num_remaining != _OPEN_ROW:
        # 2. Sums of the node's arms; where all mass arms are 0, prior arms take their place.
        num_visits = nodes[node].visits if node > 0 else num_walks
        share = alpha / (1.0 + decay * num_visits)
        total_m, total_p, top_m = _totals(nodes, node, share)
        no_mass = total_m == 0.0
        choose_prior = prior_arms or no_mass
        # 3. An arm in proportion.
        total = total_p if choose_prior else total_m
        target = uniform(key, 1 + nodes[node].depth) * total
        child, mass_m, mass_p = _choose(nodes, node, target, choose_prior, top_m, share)
        # 4. a_p and a_m: times (probability of the arm) / p_c, or / (1 - P_E) and / (1 - Q_E) for the residual arm.
        log_share = nodes[node].log_residual if child < 0 else nodes[child].log_prior
        log_share_m = nodes[node].log_residual_proposal if child < 0 else nodes[child].log_prior
        log_ap += np.log(mass_p) - np.log(total_p) - log_share
        if no_mass:
            log_am += np.log(mass_p) - np.log(total_p) - log_share_m
        elif mass_m == 0.0:
            log_am = -np.inf
        else:
            log_am += np.log(mass_m) - np.log(total_m) - log_share_m
        # 5. The residual arm ends the descent.
        if child < 0:
            break
        node = child
    return node, log_am, log_ap, prior_arms


@njit(cache=True, inline="always")
def _log_arm(nodes, child, share):
    """Log mass arm of a child, F's share in it being `share`: p_c U_c^(1-a) (A_c O_c)^a."""
    log_prior = nodes[child].log_prior
    log_unknown = nodes[child].log_unknown
    if share == 0.0 or log_unknown == -np.inf:
        return log_prior + log_unknown
    log_guess = nodes[child].log_advantage + nodes[child].log_open
    return log_prior + (1.0 - share) * log_unknown + share * log_guess


@njit(cache=True, inline="always")
def _log_residual_arm(nodes, node, share):
    """Log mass arm of the tokens outside the children, F's share in it being `share`: (1 - Q_E) R^(1-a)."""
    log_rate = nodes[node].log_rate
    mixed_rate = log_rate if share == 0.0 else (1.0 - share) * log_rate
    return nodes[node].log_residual_proposal + mixed_rate


@njit(cache=True, inline="always")
def _totals(nodes, node, share):
    """Sums of the mass arms (scaled by exp(-top)) and of the prior arms, and that top."""
    log_residual_arm = _log_residual_arm(nodes, node, share)
    top = log_residual_arm
    child = nodes[node].first_child
    while child >= 0:
        top = max(top, _log_arm(nodes, child, share))
        child = nodes[child].next_sibling
    total_p = np.exp(nodes[node].log_residual)
    total_m = 0.0 if top == -np.inf else np.exp(log_residual_arm - top)
    child = nodes[node].first_child
    while child >= 0:
        total_p += np.exp(nodes[child].log_prior + nodes[child].log_open)
        if top > -np.inf:
            total_m += np.exp(_log_arm(nodes, child, share) - top)
        child = nodes[child].next_sibling
    return total_m, total_p, top


@njit(cache=True, inline="always")
def _choose(
    nodes,  # [N] records of the tree
    node,
    target,  # in [0, sum of the arms)
    choose_prior,  # whether it is the sum of prior arms
    top,  # log scale of mass arms, as in `_totals`
    share,  # F's share in mass arms
):
    """The arm where the running sum passes `target`: (child or -1 for the residual arm, mass arm, prior arm).

    The last arm with positive mass is taken when rounding leaves the target beyond the sum.
    """
    best = -2
    best_m = 0.0
    best_p = 0.0
    running = 0.0
    # 1. The residual arm, where tokens are left outside the children.
    if nodes[node].num_remaining > 0:
        best_p = np.exp(nodes[node].log_residual)
        best_m = 0.0 if top == -np.inf else np.exp(_log_residual_arm(nodes, node, share) - top)
        running = best_p if choose_prior else best_m
        if running > 0.0:
            best = -1
    # 2. The children.
    child = nodes[node].first_child
    while child >= 0 and (best == -2 or running <= target):
        mass_p = np.exp(nodes[child].log_prior + nodes[child].log_open)
        mass_m = 0.0 if top == -np.inf else np.exp(_log_arm(nodes, child, share) - top)
        mass = mass_p if choose_prior else mass_m
        if mass > 0.0:
            best = child
            best_m = mass_m
            best_p = mass_p
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
    """K, U, O and R of a node from its expanded children E (docs/concepts/exactness.md)."""
    log_residual = nodes[node].log_residual
    # 1. The largest term of each sum, and how many children there are.
    top_k = -np.inf
    top_u = -np.inf
    top_o = log_residual
    top_m = -np.inf
    count = 0
    child = nodes[node].first_child
    while child >= 0:
        log_p = nodes[child].log_prior
        log_ratio = log_p - nodes[child].log_proposal
        log_known = nodes[child].log_known
        log_unknown = nodes[child].log_unknown
        top_k = max(top_k, log_p + log_known)
        top_u = max(top_u, log_p + log_unknown)
        top_o = max(top_o, log_p + nodes[child].log_open)
        top_m = max(top_m, max(log_known, log_unknown) + log_ratio)
        count += 1
        child = nodes[child].next_sibling
    # 2. Sums over E, scaled: p_c K_c, p_c U_c, p_c O_c, and (K_c + U_c) p_c/q_c.
    sum_k = 0.0
    sum_u = 0.0
    sum_o = 0.0
    sum_m = 0.0
    child = nodes[node].first_child
    while child >= 0:
        log_p = nodes[child].log_prior
        log_ratio = log_p - nodes[child].log_proposal
        log_known = nodes[child].log_known
        log_unknown = nodes[child].log_unknown
        if top_k > -np.inf:
            sum_k += np.exp(log_p + log_known - top_k)
        if top_u > -np.inf:
            sum_u += np.exp(log_p + log_unknown - top_u)
        if top_o > -np.inf:
            sum_o += np.exp(log_p + nodes[child].log_open - top_o)
        if top_m > -np.inf:
            known = log_known + log_ratio
            unknown = log_unknown + log_ratio
            sum_m += np.exp(known - top_m) + np.exp(unknown - top_m)
        child = nodes[child].next_sibling
    # 3. R = mean over E of (K_c + U_c) p_c/q_c;  K = sum of p_c K_c.
    nodes[node].log_rate = top_m + np.log(sum_m / count) if top_m > -np.inf else -np.inf
    nodes[node].log_known = top_k + np.log(sum_k) if top_k > -np.inf else -np.inf
    # 4. O = sum of p_c O_c + (1 - P_E).
    if top_o > -np.inf:
        sum_o += np.exp(log_residual - top_o)
    nodes[node].log_open = top_o + np.log(sum_o) if top_o > -np.inf else -np.inf
    # 5. U = sum of p_c U_c + (1 - Q_E) R, the second while tokens are left outside E.
    log_u = top_u + np.log(sum_u) if top_u > -np.inf else -np.inf
    if nodes[node].num_remaining > 0:
        log_u = np.logaddexp(log_u, nodes[node].log_residual_proposal + nodes[node].log_rate)
    nodes[node].log_unknown = log_u


@njit(cache=True, inline="always")
def _log_total_mass(nodes, child):
    """log p_c (K_c + U_c)."""
    log_mass = np.logaddexp(nodes[child].log_known, nodes[child].log_unknown)
    return nodes[child].log_prior + log_mass


@njit(cache=True)
def fall_mass(nodes, key):
    """One walk by total mass: child p_c (K_c + U_c), residual (1 - Q_E) R; a terminal node or a residual's node."""
    node = 0
    while nodes[node].first_child >= 0:
        # 1. The sum of all arms, scaled by the largest.
        log_residual = nodes[node].log_residual_proposal + nodes[node].log_rate
        top = log_residual
        child = nodes[node].first_child
        while child >= 0:
            top = max(top, _log_total_mass(nodes, child))
            child = nodes[child].next_sibling
        residual = np.exp(log_residual - top) if nodes[node].num_remaining > 0 else 0.0
        total = residual
        child = nodes[node].first_child
        while child >= 0:
            total += np.exp(_log_total_mass(nodes, child) - top)
            child = nodes[child].next_sibling
        # 2. The arm where the running sum passes the target, the residual arm first.
        target = uniform(key, nodes[node].depth) * total - residual
        if target < 0.0:
            break
        chosen = nodes[node].first_child
        child = chosen
        while child >= 0 and target >= 0.0:
            target -= np.exp(_log_total_mass(nodes, child) - top)
            chosen = child
            child = nodes[child].next_sibling
        node = chosen
    return node
