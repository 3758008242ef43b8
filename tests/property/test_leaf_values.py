"""Leaf values without rollouts: as good as the flow, exact with an exact one, and nothing claimed.

See docs/concepts/flow.md#leaf-values.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from sdt_dist.search.result import SearchResult
from tests.proposal_helpers import flow_of, run_with_flow
from tests.search_helpers import total_variation, toy

LEAVES = {"leaf_values": True, "draw": "fall"}
OTHERS = [{}, {"alpha": 0.5}, {"alpha": 1.0, "alpha_decay": None, "wave_size": 4}]


def run_leaves(name: str, kind: str, seed: int = 3, **options) -> SearchResult:
    return run_with_flow(
        name, "s_adt", flow_of(name, kind), [seed], **({"num_samples": 1} | LEAVES | options)
    )[0]


class FallLaw:
    """The law of a tree's falls that go on from q, by hand: child p_c (K_c + U_c), residual (1 - Q_E) R, then q."""

    def __init__(self, run: SearchResult, name: str, kind: str) -> None:
        assert run.tree is not None
        self.tree = run.tree
        self.model = toy(name)
        self.law = np.zeros(len(toy(name).target))
        flow = flow_of(name, kind)
        size = self.model.vocab_size
        strength = self.model.inverse_temperature
        tilts = [strength * values.reshape(-1, size) for values in flow._tables[1:]]
        rows = [row + tilt for row, tilt in zip(self.model.log_prob_tables, tilts, strict=True)]
        self.log_q = [row - logsumexp(row, axis=1, keepdims=True) for row in rows]
        self._fall(0, (), 1.0)

    def _fall(self, node: int, prefix: tuple[int, ...], mass: float) -> None:
        nodes = self.tree.nodes
        children = {int(self.tree.nodes["token"][c]): c for c in self.tree.children(node)}
        if self.tree.is_terminal(node):
            self.law[self.model.index(prefix)] += mass
            return
        row, log_q = (
            tables[len(prefix)][self.model.index(prefix)]
            for tables in (self.model.log_prob_tables, self.log_q)
        )
        rest = [token for token in range(self.model.vocab_size) if token not in children]
        rate = nodes["log_rate"][node] if children else 0.0
        arms = {
            t: row[t] + np.logaddexp(nodes["log_known"][c], nodes["log_unknown"][c])
            for t, c in children.items()
        }
        arms |= {t: log_q[t] + rate for t in rest}
        for token, arm in arms.items():
            below = (*prefix, token)
            share = mass * np.exp(arm - logsumexp(list(arms.values())))
            if token in children:
                self._fall(children[token], below, share)
            else:
                self._go_on(below, share)

    def _go_on(self, prefix: tuple[int, ...], mass: float) -> None:
        """The rest by q, for all sequences that begin with a prefix."""
        laws = np.ones(1)
        start = self.model.index(prefix)
        for depth in range(len(prefix), self.model.length):
            rows = np.exp(self.log_q[depth][start : start + len(laws)])
            laws = (laws[:, None] * rows).ravel()
            start = start * self.model.vocab_size
        self.law[start : start + len(laws)] += mass * laws


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("num_rollouts", [1, 10, 200])
def test_with_an_exact_flow_samples_have_the_target_law_at_any_budget(num_rollouts, others):
    run = run_leaves("A", "exact", num_rollouts=num_rollouts, **others)
    np.testing.assert_allclose(FallLaw(run, "A", "exact").law, toy("A").target, atol=1e-12)
    assert (
        run.log_z is None and run.log_z_error is None and run.ess is None and not run.log_z_unbiased
    )


def test_samples_have_the_law_of_the_trees_falls():
    draws = 2000
    run = run_leaves("U", "opposite", num_rollouts=8, num_samples=draws)
    expected = draws * FallLaw(run, "U", "opposite").law
    found = np.bincount([toy("U").index(sample.tokens) for sample in run.samples], minlength=27)
    assert expected.sum() == pytest.approx(draws)
    assert np.sum((found - expected) ** 2 / expected) < 58  # 26 degrees: p < 3e-4 above


def test_samples_are_as_good_as_the_flow_until_walks_have_finished():
    """On A: 0.50, 0.17, 0 with a flow off by 1 nat; 0.61, 0.54, 0 with one of the wrong sign (625 leaves: exhausted)."""
    errors = {
        kind: [total_variation(FallLaw(run_leaves("A", kind, num_rollouts=n), "A", kind).law, toy("A")) for n in (10, 300, 1000)]
        for kind in ("noisy", "opposite")
    }  # fmt: skip
    assert errors["noisy"][0] < 0.6 < errors["opposite"][0]
    assert errors["noisy"][1] < 0.3 < errors["opposite"][1]
    assert max(error[2] for error in errors.values()) < 1e-9


@pytest.mark.parametrize("proposal", [True, False])
def test_a_walk_costs_at_most_one_row(proposal):
    run = run_leaves("C", "noisy", num_rollouts=200, proposal=proposal)
    assert run.rollouts == 200 and len(run.samples) == 1
    assert run.nfe <= 200 + toy("C").length
    assert (run.tree.nodes[: run.tree.size]["status"] == 0).sum() > 100


def test_new_nodes_start_with_the_flows_value_and_finished_ones_with_their_reward():
    model = toy("U")
    flow = flow_of("U", "noisy")
    run = run_leaves("U", "noisy", num_rollouts=9)
    nodes = run.tree.nodes
    strength = model.inverse_temperature
    for node in range(1, run.tree.size):
        tokens = run.tree.tokens(node)
        if run.tree.is_terminal(node):
            assert nodes["log_known"][node] == pytest.approx(
                strength * model.rewards[model.index(tokens)]
            )
        elif not run.tree.children(node):
            value = strength * flow.values([(None, tokens)], strength)[0]
            assert nodes["log_unknown"][node] == nodes["log_rate"][node] == pytest.approx(value)
            assert nodes["log_known"][node] == -np.inf and nodes["log_open"][node] == 0.0


@pytest.mark.parametrize("others", [*OTHERS, {"proposal": False}])
def test_an_exhausted_tree_is_exact_and_says_so(others):
    run = run_leaves("A", "opposite", num_rollouts=20_000, **({"wave_size": 8} | others))
    assert run.exhausted and run.log_z_unbiased
    assert run.log_z == pytest.approx(toy("A").log_z, abs=1e-9)
    np.testing.assert_allclose(FallLaw(run, "A", "opposite").law, toy("A").target, atol=1e-9)


def test_a_search_that_finishes_no_walk_still_returns_finished_samples():
    run = run_leaves("C", "noisy", num_samples=8, num_rollouts=2)
    assert len(run.samples) == 8 and all(len(sample.tokens) == 6 for sample in run.samples)
    assert run.best.reward == max(sample.reward for sample in run.samples)
