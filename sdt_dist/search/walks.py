"""Final draws from value trees: Boltzmann walks over finished sequences, and greedy walks (SPEC 1.1, last lines)."""

from __future__ import annotations

import numpy as np

from sdt_dist.search.resample import systematic
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import Session
from sdt_dist.search.soft import walk_law
from sdt_dist.search.tree import TERMINAL, Tree


def boltzmann_result(session: Session, tree: Tree, method: str, exhausted: bool) -> SearchResult:
    """Samples by tree walks pi(a|s) ~ w_a exp(lambda v_a); their law is known, log_z = lambda v(root)."""
    inverse_temperature = session.options.inverse_temperature
    reach = walk_law(tree.nodes, tree.size, inverse_temperature)
    probabilities = np.zeros(len(session.finished))
    for leaf in np.flatnonzero(tree.nodes["status"][: tree.size] == TERMINAL).tolist():
        if np.isfinite(reach[leaf]):
            probabilities[session.index_of(tree.tokens(leaf))] += np.exp(reach[leaf])
    probabilities /= probabilities.sum()
    return session.result(
        method,
        systematic(probabilities, session.options.num_samples, session.rng("resample")).tolist(),
        log_z=float(inverse_temperature * tree.nodes["value"][0]),
        ess=float(1.0 / np.sum(probabilities**2)),
        exhausted=exhausted,
        tree=tree,
        probabilities=probabilities,
    )


def greedy_result(session: Session, tree: Tree, method: str, by: str, exhausted: bool) -> SearchResult:
    """The walk that takes the child with the largest field `by` at every node, then the best by reward."""
    node = 0
    while children := [c for c in tree.children(node) if not np.isnan(tree.nodes["value"][c])]:
        node = max(children, key=lambda child: float(tree.nodes[by][child]))
    first = session.index_of(tree.tokens(node))
    rest = sorted(range(len(session.finished)), key=lambda i: -session.finished[i].reward)
    chosen = [first, *(i for i in rest if i != first)][: session.options.num_samples]
    return session.result(method, chosen, exhausted=exhausted, tree=tree)
