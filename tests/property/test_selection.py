"""Selection of value trees and the path weights of residual_ts, arm by arm, against their formulae.

See docs/concepts/target.md, docs/concepts/exactness.md.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.noise import stream_key
from sdt_dist.tree.kernels import add_child
from sdt_dist.tree.mass import walk_mass
from sdt_dist.tree.soft import BOLTZMANN, descend_enumerated
from sdt_dist.tree.tree import ENUMERATED, OPEN, Tree
from tests.search_helpers import run_toy

DRAWS = 40_000
STRENGTH = 2.0


def one_node(log_priors, values, residual: float, remaining: int, rate: float) -> Tree:
    """A root with enumerated children of given values (NaN: not yet visited)."""
    tree = Tree()
    tree.reserve(len(log_priors))
    for token, log_prior in enumerate(log_priors):
        tree.size = add_child(tree.nodes, tree.size, 0, token, log_prior)
    tree.nodes["value"][1 : tree.size] = values
    tree.nodes["status"][1 : tree.size] = OPEN
    root = tree.nodes[0]
    root["status"], root["num_remaining"], root["log_rate"] = ENUMERATED, remaining, rate
    root["log_residual"] = np.log(residual) if residual else -np.inf
    return tree


def frequencies(tree: Tree) -> np.ndarray:
    """Share of walks that end at each child, the residual arm last."""
    counts = np.zeros(tree.size)
    for i in range(DRAWS):
        node, residual = descend_enumerated(
            tree.nodes, 0, np.uint64(stream_key("draw", i)), STRENGTH, BOLTZMANN, 0.0
        )
        counts[-1 if residual else node - 1] += 1
    return counts / DRAWS


def test_selection_is_prior_times_exponential_value():
    priors = np.array([0.5, 0.3, 0.2])
    values = np.array([0.1, 1.0, -0.4])
    weights = np.append(priors * np.exp(STRENGTH * values), 0.0)
    found = frequencies(one_node(np.log(priors), values, 0.0, 0, 0.0))
    np.testing.assert_allclose(found, weights / weights.sum(), atol=4 * 0.5 / np.sqrt(DRAWS))


def test_an_unvisited_child_and_the_residual_are_valued_at_the_nodes_rate_not_zero():
    """R is far from 1 = exp(lambda 0), the value that the earlier prototype gave to unvisited children."""
    priors = np.array([0.4, 0.3])
    values = np.array([-3.0, np.nan])
    rate = -6.5
    weights = np.array([0.4 * np.exp(STRENGTH * -3.0), 0.3 * np.exp(rate), 0.3 * np.exp(rate)])
    found = frequencies(one_node(np.log(priors), values, 0.3, 5, rate))
    np.testing.assert_allclose(found, weights / weights.sum(), atol=4 * 0.5 / np.sqrt(DRAWS))


def test_path_weights_average_to_one():
    """E[p/q] = 1 over the walks of a fixed tree, and no weight exceeds 1/epsilon (docs/concepts/exactness.md)."""
    epsilon = 0.25
    tree = run_toy("D", "residual_ts", 3, num_rollouts=60, wave_size=1).tree
    log_open = float(tree.nodes["log_open"][0])
    omegas = []
    for i in range(DRAWS):
        _, log_am, log_ap, _ = walk_mass(tree.nodes, np.uint64(stream_key("walk", i)), epsilon)
        omegas.append(1.0 / (epsilon * np.exp(log_ap) + (1 - epsilon) * np.exp(log_am)))
    assert max(omegas) <= 1 / epsilon + 1e-9
    spread = np.std(omegas) / np.sqrt(DRAWS)
    assert np.mean(omegas) == pytest.approx(np.exp(log_open), abs=5 * spread)
