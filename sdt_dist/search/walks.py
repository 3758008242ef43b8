"""Final draws from value trees: Boltzmann walks over finished sequences, and greedy walks.

See docs/concepts/exactness.md, last lines.

Nodes without a finished sample below, where rollouts were cut, take no part.
"""

from __future__ import annotations

import numpy as np

from sdt_dist.search.options import ValueTreeOptions
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import Session
from sdt_dist.tree.resample import systematic
from sdt_dist.tree.soft import finished_below, walk_law
from sdt_dist.tree.tree import TERMINAL, Tree


def boltzmann_result(session: Session, tree: Tree, method: str, exhausted: bool) -> SearchResult:
    """Samples by tree walks pi(a|s) ~ w_a exp(lambda v_a); their law is known, log_z = lambda v(root).

    log_z is None where rollouts were cut: values are then no soft values of rewards.
    """
    options = session.options
    assert isinstance(options, ValueTreeOptions)
    inverse_temperature = options.inverse_temperature
    is_cut = options.rollout_max_new_tokens is not None
    reach = walk_law(tree.nodes, tree.size, inverse_temperature)
    probabilities = np.zeros(len(session.finished))
    for leaf in np.flatnonzero(tree.nodes["status"][: tree.size] == TERMINAL).tolist():
        if np.isfinite(reach[leaf]):
            probabilities[session.index_of(tree.tokens(leaf))] += np.exp(reach[leaf])
    probabilities /= probabilities.sum()
    return session.result(
        method,
        systematic(probabilities, options.num_samples, session.rng("resample")).tolist(),
        log_z=None if is_cut else float(inverse_temperature * tree.nodes["value"][0]),
        ess=float(1.0 / np.sum(probabilities**2)),
        exhausted=exhausted,
        tree=tree,
        probabilities=probabilities,
    )


def greedy_result(
    session: Session, tree: Tree, method: str, by: str, exhausted: bool
) -> SearchResult:
    """The walk that takes the child with the largest field `by` at every node, then the best by reward."""
    node = 0
    alive = finished_below(tree.nodes, tree.size)
    while children := [c for c in tree.children(node) if alive[c]]:
        node = max(children, key=lambda child: float(tree.nodes[by][child]))
    first = session.index_of(tree.tokens(node))
    rest = sorted(range(len(session.finished)), key=lambda i: -session.finished[i].reward)
    chosen = [first, *(i for i in rest if i != first)][: session.options.num_samples]
    return session.result(method, chosen, exhausted=exhausted, tree=tree)
