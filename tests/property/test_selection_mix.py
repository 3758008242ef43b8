"""Searches that mix a flow into their selection stay exact, whatever the flow and the mix are.

See docs/concepts/flow.md#selection-mix.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.noise import stream_key
from sdt_dist.search.loop import Walk
from sdt_dist.search.methods.residual_ts import MassRule
from sdt_dist.search.methods.s_adt import FlowOptions
from sdt_dist.search.session import SearchProblem, Session
from sdt_dist.tree.tree import Tree
from tests.proposal_helpers import flow_of, mean_tv, ratios, run_with_flow
from tests.search_helpers import PARAMETERS, law_of, toy

RUNS = 300
WALKS = 5000
SEEDS = range(100, 104)
MIXES = {
    "decaying": {"alpha": 0.5, "alpha_decay": 2.0},
    "constant": {"alpha": 1.0, "alpha_decay": None},
}
EXACT = pytest.param("exact", marks=pytest.mark.slow)


@pytest.mark.parametrize("wave_size", [1, 4])
@pytest.mark.parametrize("proposal", [True, False])
@pytest.mark.parametrize("kind", [EXACT, "noisy", "opposite"])
@pytest.mark.parametrize("mix", MIXES)
def test_z_hat_is_unbiased_whatever_the_mix_is(mix, kind, proposal, wave_size):
    options = MIXES[mix] | {"proposal": proposal, "wave_size": wave_size, "num_rollouts": 8}
    found = ratios("U", "s_adt", flow_of("U", kind), RUNS, seed=2, **options)
    assert abs(found.mean() - 1) < 3 * max(found.std() / np.sqrt(RUNS), 1e-9)


def walk_on(tree: Tree, num_walks: int, kind: str, **options) -> tuple[np.ndarray, np.ndarray]:
    """How often WALKS walks on a fixed tree of U find each sequence [27], and how often their weights say."""
    model = Toy(*PARAMETERS["U"])
    flow = flow_of("U", kind)
    prior = np.exp(toy("U").log_prior)
    process = TokenProcess(model, model.law, model.length)
    process.load_flow(flow)
    rule = MassRule(FlowOptions(inverse_temperature=model.inverse_temperature, **options), [])
    problem = SearchProblem(0, process.root([0]), model)
    session = Session(problem, process, rule.options, 0, flow=flow.identity)
    session.budget.rollouts = num_walks
    walks = [
        Walk(i, np.uint64(stream_key("arms", i)), stream_key("tokens", i)) for i in range(WALKS)
    ]
    rollouts = process.rollout([rule.advance(session, tree, walk) for walk in walks])
    found = np.zeros(len(prior))
    laws = np.zeros(len(prior))
    for walk, rollout in zip(walks, rollouts, strict=True):
        index = model.index((*tree.tokens(walk.node), *rollout.tokens.tolist()))
        of_proposal = rollout.log_proposal if rule.options.flow_uses.proposal else rollout.log_prob
        rule._weigh(walk, float((of_proposal - rollout.log_prob).sum()))
        law = prior[index] * np.exp(-walk.log_omega)
        assert laws[index] == 0 or law == pytest.approx(laws[index], rel=1e-12)
        found[index], laws[index] = found[index] + 1, law
    return found, WALKS * laws


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    outside = expected > 0
    return float(np.sum((found - expected)[outside] ** 2 / expected[outside]))


@pytest.mark.parametrize("proposal", [True, False])
@pytest.mark.parametrize("kind", ["noisy", "opposite"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_walk_has_the_law_that_its_weight_says(mix, kind, proposal):
    """On a fixed tree: p/omega sums to 1 over the sequences outside, and is how often each is found."""
    options = MIXES[mix] | {"proposal": proposal}
    (run,) = run_with_flow(
        "U", "s_adt", flow_of("U", kind), [3], num_rollouts=6, wave_size=3, **options
    )
    found, expected = walk_on(run.tree, 6, kind, **options)
    assert expected.sum() == pytest.approx(WALKS, abs=1e-5)
    assert chi_square(found, expected) < 58  # at most 26 degrees: p < 3e-4 above
    if mix == "constant":
        _, unmixed = walk_on(run.tree, 6, kind, alpha=0.0, proposal=proposal)
        assert chi_square(found, unmixed) > 100, "weights of other arms are noticed"


def log_omega(
    tree: Tree, name: str, kind: str, sequence, num_walks: int, options: FlowOptions
) -> float:
    """omega of a walk that found `sequence` outside `tree`, from the arms as docs/concepts/flow.md#selection-mix has them."""
    model = toy(name)
    flow = flow_of(name, kind)
    node = 0
    strength = toy(name).inverse_temperature
    log_am = log_ap = log_drawn = 0.0
    for depth, token in enumerate(sequence):
        row = model.log_prob_tables[depth][model.index(sequence[:depth])]
        tilt = flow.log_tilts([(None, sequence[:depth])], strength, None)[0]
        log_norm = logsumexp(row + tilt)
        drawn = row + tilt - log_norm if options.proposal else row
        children = (
            {}
            if node < 0
            else {int(tree.nodes["token"][c]): tree.nodes[c] for c in tree.children(node)}
        )
        if children:
            count = tree.nodes["visits"][node] if node else num_walks
            decay = options.alpha_decay
            share = options.alpha * (1.0 if decay is None else decay / (decay + count))
            of_f = {c: share * (tilt[c] + child["log_open"]) for c, child in children.items()}
            opened = {c: child for c, child in children.items() if np.isfinite(child["log_open"])}
            mass = {
                c: row[c] + (1 - share) * child["log_unknown"] + of_f[c]
                for c, child in opened.items()
            }
            prior = {c: row[c] + child["log_open"] for c, child in children.items()}
            rest = [c for c in range(model.vocab_size) if c not in children]
            if rest:
                rate = tree.nodes["log_rate"][node]
                mass[-1] = logsumexp(drawn[rest]) + (1 - share) * rate + share * log_norm
                prior[-1] = logsumexp(row[rest])
            arm = token if token in children else -1
            log_am += (
                mass[arm]
                - logsumexp(list(mass.values()))
                - (row[token] if arm >= 0 else logsumexp(drawn[rest]))
            )
            log_ap += (
                prior[arm]
                - logsumexp(list(prior.values()))
                - (row[token] if arm >= 0 else logsumexp(row[rest]))
            )
        if token not in children:
            log_drawn += drawn[token] - row[token]
        node = (
            next((c for c in tree.children(node) if tree.nodes["token"][c] == token), -1)
            if node >= 0
            else -1
        )
    return -float(logsumexp([np.log(0.25) + log_ap, np.log(0.75) + log_am + log_drawn]))


@pytest.mark.parametrize("proposal", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_weights_of_a_wave_are_those_of_the_tree_and_the_counts_before_it(mix, proposal):
    options = MIXES[mix] | {"proposal": proposal, "wave_size": 4}
    flow = flow_of("A", "noisy")
    parsed = FlowOptions(**(MIXES[mix] | {"proposal": proposal}))
    (before,) = run_with_flow("A", "s_adt", flow, [4], num_rollouts=36, **options)
    (after,) = run_with_flow("A", "s_adt", flow, [4], num_rollouts=40, **options)
    found = after.snapshot.notes["sample"][36:]
    expected = [
        log_omega(before.tree, "A", "noisy", after.snapshot.sequences[i], 36, parsed) for i in found
    ]
    np.testing.assert_allclose(after.snapshot.notes["log_omega"][36:], expected, atol=1e-8)


@pytest.mark.parametrize("method", ["residual_ts", "s_adt"])
def test_every_node_counts_the_walks_that_went_through_it(method):
    flow = flow_of("A", "noisy") if method == "s_adt" else None
    (run,) = run_with_flow("A", method, flow, [4], num_rollouts=50, wave_size=4)
    visits = run.tree.nodes["visits"]
    assert visits[0] == 50
    for node in range(run.tree.size):
        assert run.tree.is_terminal(node) or visits[node] == visits[run.tree.children(node)].sum()


@pytest.mark.parametrize("proposal", [True, False])
@pytest.mark.parametrize("kind", [EXACT, "opposite"])
@pytest.mark.parametrize("mix", MIXES)
def test_exhaustion_is_exact_whatever_the_mix_is(mix, kind, proposal):
    model = toy("A")
    options = MIXES[mix] | {"num_rollouts": 20_000, "wave_size": 8, "proposal": proposal}
    (run,) = run_with_flow("A", "s_adt", flow_of("A", kind), [7], **options)
    assert run.exhausted and run.log_z == pytest.approx(model.log_z, abs=1e-6)
    np.testing.assert_allclose(law_of(run, model), model.target, atol=1e-9)


def test_a_decaying_share_keeps_what_searches_reach_and_a_constant_one_of_a_wrong_flow_does_not():
    """On B with 300 walks, where a constant share of a wrong flow goes on sending walks to the wrong places; see `s_adt`."""
    options = {"num_rollouts": 300, "wave_size": 4}
    constant = MIXES["constant"]
    exact = flow_of("B", "exact")
    opposite = flow_of("B", "opposite")
    plain = {"proposal": False}
    without = mean_tv("B", "s_adt", exact, SEEDS, **options)
    assert mean_tv("B", "s_adt", exact, SEEDS, alpha=1.0, **options) < 1.03 * without
    assert mean_tv("B", "s_adt", exact, SEEDS, **constant, **options) > 1.2 * without
    decayed = mean_tv("B", "s_adt", opposite, SEEDS, alpha=1.0, **plain, **options)
    assert decayed < mean_tv("B", "residual_ts", None, SEEDS, **options) + 0.05
    assert mean_tv("B", "s_adt", opposite, SEEDS, **constant, **plain, **options) > 1.5 * decayed


def test_without_a_share_the_flow_is_read_and_changes_nothing():
    """alpha so small that its arms are those of residual_ts, to rounding, with rows that carry tilts."""
    (found,) = run_with_flow(
        "D", "s_adt", flow_of("D", "noisy"), [5], num_rollouts=60, proposal=False, alpha=1e-14
    )
    (plain,) = run_with_flow("D", "residual_ts", None, [5], num_rollouts=60)
    assert [s.tokens for s in found.finished] == [s.tokens for s in plain.finished]
    assert found.log_z == pytest.approx(plain.log_z, abs=1e-9) and found.nfe == plain.nfe
    nodes = found.tree.nodes[: found.tree.size]
    np.testing.assert_array_equal(nodes["log_proposal"], nodes["log_prior"])
    assert np.any(nodes["log_advantage"] != 0)
