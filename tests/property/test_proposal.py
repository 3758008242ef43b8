"""Searches that draw from a learned proposal stay exact whatever the flow is.

See docs/concepts/exactness.md, docs/concepts/flow.md#proposal.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.noise import stream_key
from sdt_dist.search.api import run_searches
from sdt_dist.search.loop import Walk
from sdt_dist.search.methods import residual_ts
from sdt_dist.search.methods.residual_ts import MassRule
from sdt_dist.search.methods.s_adt import FlowOptions
from sdt_dist.search.session import SearchProblem, Session
from sdt_dist.tree.tree import Tree
from tests.proposal_helpers import TableFlow, flow_of, mean_tv, ratios, run_with_flow
from tests.search_helpers import PARAMETERS, law_of, run_toy, toy

RUNS = 1000
WALKS = 10_000
SEEDS = range(100, 108)
KINDS = ["exact", "noisy", "opposite", pytest.param("shuffled", marks=pytest.mark.slow)]
METHODS = {
    "alone": ("s_adt", {"wave_size": 1}),
    "waves": ("s_adt", {"wave_size": 4}),
    "snis": ("snis", {}),
    "smc": ("smc", {"segments": 3, "ess_threshold": 0.9}),
}


def standard_errors(found: np.ndarray) -> float:
    """How many standard errors a mean of Z-hat / Z is from 1; rounding counts as none."""
    return float(abs(found.mean() - 1) / max(found.std() / np.sqrt(len(found)), 1e-9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_z_hat_is_unbiased_whatever_the_flow_is(method, kind):
    name, options = METHODS[method]
    assert (
        standard_errors(
            ratios("U", name, flow_of("U", kind), RUNS, seed=2, num_rollouts=8, **options)
        )
        < 3
    )


@pytest.mark.parametrize("method", METHODS)
def test_forgetting_the_ratio_of_p_to_q_is_noticed(method, monkeypatch):
    """The laws above fail by far for a search that weights its draws from q as if they were from p."""
    monkeypatch.setattr(residual_ts, "path_log_ratio", lambda nodes, node, above: 0.0)
    monkeypatch.setattr("sdt_dist.search.methods.sampling.log_ratio", lambda rollout: 0.0)
    monkeypatch.setattr("sdt_dist.search.methods.smc.log_ratio", lambda rollout: 0.0)
    name, options = METHODS[method]
    assert (
        standard_errors(ratios("U", name, flow_of("U", "noisy"), RUNS, num_rollouts=8, **options))
        > 6
    )


@pytest.mark.parametrize("num_rollouts", [0, 3, 6])
@pytest.mark.parametrize("kind", ["noisy", "opposite"])
def test_a_walk_has_the_law_that_its_weight_says(kind, num_rollouts):
    """On a fixed tree: one omega a sequence, p/omega sums to 1 over the sequences outside, and is how often each is found."""
    model = Toy(*PARAMETERS["U"])
    flow = flow_of("U", kind)
    process = TokenProcess(model, model.law, model.length)
    process.load_flow(flow)
    tree = Tree()
    prior = np.exp(model.log_prior)
    if num_rollouts:
        tree = run_with_flow("U", "s_adt", flow, [3], num_rollouts=num_rollouts, wave_size=3)[
            0
        ].tree
    options = FlowOptions(inverse_temperature=model.inverse_temperature)
    session = Session(
        SearchProblem(0, process.root([0]), model), process, options, 0, flow=flow.identity
    )
    rule = MassRule(options, [])
    walks = [
        Walk(i, np.uint64(stream_key("arms", i)), stream_key("tokens", i)) for i in range(WALKS)
    ]
    rollouts = process.rollout([rule.advance(session, tree, walk) for walk in walks])
    found = np.zeros(len(prior))
    laws = np.zeros(len(prior))
    for walk, rollout in zip(walks, rollouts, strict=True):
        index = model.index((*tree.tokens(walk.node), *rollout.tokens.tolist()))
        rule._weigh(walk, float((rollout.log_proposal - rollout.log_prob).sum()))
        law = prior[index] * np.exp(-walk.log_omega)
        assert laws[index] == 0 or law == pytest.approx(laws[index], rel=1e-12)
        found[index], laws[index] = found[index] + 1, law
    assert laws.sum() == pytest.approx(1.0, abs=1e-9)
    outside = laws > 0
    expected = WALKS * laws
    # at most 26 degrees: p < 3e-4 above
    assert np.sum((found - expected)[outside] ** 2 / expected[outside]) < 58


def test_a_constant_flow_proposes_p():
    """q has the probabilities of p, so only the noise of draws differs."""
    runs = run_with_flow("A", "s_adt", flow_of("A", "constant"), range(4), num_rollouts=100)
    for nodes in (run.tree.nodes[: run.tree.size] for run in runs):
        np.testing.assert_allclose(nodes["log_proposal"], nodes["log_prior"], atol=1e-12)
        rest = nodes["num_remaining"] > 0
        np.testing.assert_allclose(
            nodes["log_residual_proposal"][rest], nodes["log_residual"][rest], atol=1e-9
        )
    found = mean_tv("A", "s_adt", flow_of("A", "constant"), SEEDS, num_rollouts=300, wave_size=1)
    assert found == pytest.approx(
        mean_tv("A", "residual_ts", None, SEEDS, num_rollouts=300, wave_size=1), abs=0.03
    )


@pytest.mark.parametrize(
    "options", [{"wave_size": 1}, {"wave_size": 4}, {"wave_size": 4, "draw": "fall"}]
)
def test_without_its_uses_s_adt_is_residual_ts(options):
    (found,) = run_with_flow(
        "D", "s_adt", flow_of("D", "noisy"), [5], num_rollouts=60, proposal=False, **options
    )
    plain = run_toy("D", "residual_ts", 5, num_rollouts=60, **options)
    assert [s.tokens for s in found.samples] == [s.tokens for s in plain.samples]
    assert (found.method, found.log_z, found.cost.nfe) == ("s_adt", plain.log_z, plain.cost.nfe)
    arrays = plain.tree.arrays()
    assert all(
        np.array_equal(value, arrays[name], equal_nan=True)
        for name, value in found.tree.arrays().items()
    )
    assert np.array_equal(arrays["log_proposal"], arrays["log_prior"])
    assert np.array_equal(arrays["log_residual_proposal"], arrays["log_residual"])


@pytest.mark.parametrize("kind", KINDS)
def test_exhaustion_is_exact_whatever_the_flow_is(kind):
    model = toy("A")
    (run,) = run_with_flow("A", "s_adt", flow_of("A", kind), [7], num_rollouts=20_000)
    assert run.exhausted and len(run.finished) == 625
    assert run.log_z == pytest.approx(model.log_z, abs=1e-6)
    np.testing.assert_allclose(law_of(run, model), model.target, atol=1e-9)


def test_a_flow_that_makes_most_tokens_nearly_impossible_keeps_searches_exact():
    """Tilts of thousands of nats: q keeps every token possible, and no weight is lost or infinite."""
    model = toy("U")
    steep = TableFlow("steep", model, [1e4 * values for values in model.soft_values])
    (run,) = run_with_flow("U", "s_adt", steep, [0], num_rollouts=2000)
    assert run.exhausted and run.log_z == pytest.approx(model.log_z, abs=1e-9)
    found = ratios("U", "s_adt", steep, RUNS, num_rollouts=8)
    assert np.isfinite(found).all() and standard_errors(found) < 3


@pytest.mark.parametrize(
    ("name", "num_rollouts", "exact", "noisy"), [("B", 100, 0.35, 0.5), ("C", 300, 0.75, 0.9)]
)
def test_a_good_flow_brings_searches_nearer(name, num_rollouts, exact, noisy):
    """Where siblings differ by several nats, even a flow that is off by one nat helps."""
    options = {"num_rollouts": num_rollouts, "wave_size": 1}
    plain = mean_tv(name, "residual_ts", None, SEEDS, **options)
    assert mean_tv(name, "s_adt", flow_of(name, "exact"), SEEDS, **options) < exact * plain
    assert mean_tv(name, "s_adt", flow_of(name, "noisy"), SEEDS, **options) < noisy * plain


@pytest.mark.parametrize("name", ["A", "C", "D"])
def test_an_exact_flow_makes_log_z_much_more_precise(name):
    plain, exact = (
        np.sqrt(np.mean((ratios(name, method, flow, 16, num_rollouts=100) - 1) ** 2))
        for method, flow in [("residual_ts", None), ("s_adt", flow_of(name, "exact"))]
    )
    assert exact < 0.4 * plain


def test_an_exact_flow_makes_every_weight_of_snis_and_smc_equal():
    for method in ("snis", "smc"):
        (run,) = run_with_flow("C", method, flow_of("C", "exact"), [0], num_rollouts=50)
        assert run.ess == pytest.approx(50, rel=1e-9)
        assert run.log_z == pytest.approx(toy("C").log_z, abs=1e-9)


def test_samples_of_a_good_flow_do_not_depend_on_companions():
    """The same problem alone and beside others, whose rows share its batches."""
    flow = flow_of("D", "noisy")
    model = Toy(*PARAMETERS["D"])
    process = TokenProcess(model, model.law, model.length)

    def samples(indices):
        problems = [SearchProblem(i, process.root([0]), model) for i in indices]
        options = {"num_rollouts": 30, "inverse_temperature": 5.0}
        runs = run_searches(process, problems, method="s_adt", options=options, seed=3, flow=flow)
        return {i: [s.tokens for s in run.samples] for i, run in runs}

    assert samples([2])[2] == samples([0, 1, 2, 3])[2]
