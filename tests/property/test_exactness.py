"""Exactness laws of the search on toys with exact answers (docs/concepts/exactness.md#toys)."""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.noise import stream_key
from sdt_dist.protocols import Decoded
from sdt_dist.search.api import run_searches
from sdt_dist.search.methods import dts, maxent_ts
from sdt_dist.search.session import SearchProblem
from sdt_dist.tree import soft
from sdt_dist.tree.tree import Tree
from tests.dts_reference import dts_law
from tests.search_helpers import (
    PARAMETERS,
    law_of,
    mean_total_variation,
    run_seeds,
    run_toy,
    total_variation,
    toy,
)

SEEDS = range(100, 108)


@pytest.mark.parametrize(
    ("name", "log_z"),
    [("A", 3.157463), ("B", 13.424402), ("C", 14.231579), ("D", 2.760011), ("U", 3.466608)],
)
def test_the_toys_are_those_of_the_specification(name, log_z):
    assert toy(name).log_z == pytest.approx(log_z, abs=1e-6)
    assert toy(name).target.sum() == pytest.approx(1.0, abs=1e-9)


def test_the_first_sequence_of_toy_a():
    assert np.exp(toy("A").log_prior[0]) == pytest.approx(0.00027067, abs=1e-8)
    assert toy("A").rewards[0] == pytest.approx(0.60143397, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "num_rollouts", "bound"),
    [("A", 300, 0.30), ("A", 1000, 1e-6), ("B", 1000, 0.15), ("D", 1000, 0.42)],
)
def test_residual_ts_meets_the_acceptance_figures(name, num_rollouts, bound):
    assert mean_total_variation(name, "residual_ts", num_rollouts, SEEDS, wave_size=1) < bound


@pytest.mark.slow
def test_residual_ts_meets_the_acceptance_figure_of_toy_c():
    assert mean_total_variation("C", "residual_ts", 3000, SEEDS, wave_size=1) < 0.40


MULTISET = {"weights": "multiset", "wave_size": 1}
HORVITZ_THOMPSON = {"weights": "horvitz_thompson", "wave_size": 1}


@pytest.mark.parametrize(
    ("method", "options", "name", "num_rollouts", "num_seeds", "spread", "table"),
    [
        ("snis", {}, "A", 300, 8, 0.021, 0.443),
        ("snis", {}, "A", 1000, 8, 0.012, 0.258),
        ("snis", {}, "B", 1000, 64, 0.099, 0.401),
        ("snis", {}, "D", 1000, 8, 0.012, 0.518),
        ("dts", MULTISET, "A", 300, 8, 0.022, 0.461),
        ("dts", MULTISET, "A", 1000, 8, 0.013, 0.258),
        ("dts", MULTISET, "B", 1000, 16, 0.098, 0.375),
        ("dts", MULTISET, "D", 1000, 4, 0.014, 0.520),
        ("dts", HORVITZ_THOMPSON, "A", 300, 8, 0.022, 0.404),
        ("dts", HORVITZ_THOMPSON, "A", 1000, 8, 0.010, 0.152),
        ("dts", HORVITZ_THOMPSON, "B", 1000, 16, 0.113, 0.261),
        ("dts", HORVITZ_THOMPSON, "D", 1000, 4, 0.009, 0.464),
    ],
)
def test_snis_and_dts_reproduce_the_table(
    method, options, name, num_rollouts, num_seeds, spread, table
):
    """Within three standard errors of the specification's table, whose figures are means of 16 seeds themselves.

    `spread` is one search's standard deviation over 500 to 4000 seeds (200 on D) of an independent implementation.
    On B it is wide because two sequences hold 46% of the target, and one search in six misses (31, 49), p = 0.0007,
    at a cost of 0.2 to 0.3. So a mean of 16 is good to 0.025 (HT 0.028), and a spread taken from 16 seeds misleads:
    none of 100 to 115 misses it, which gives 0.296 (HT 0.222). Over 4000 seeds the rule's mean is 0.344 (HT 0.254).
    """
    found = mean_total_variation(name, method, num_rollouts, range(100, 100 + num_seeds), **options)
    assert found == pytest.approx(table, abs=3 * spread * np.sqrt(1 / 16 + 1 / num_seeds))


@pytest.mark.parametrize("horvitz_thompson", [False, True])
@pytest.mark.parametrize(
    ("name", "num_rollouts", "num_seeds", "spread", "count_spread"),
    [
        ("A", 300, 16, 0.022, 7),
        pytest.param("B", 1000, 64, 0.11, 14, marks=pytest.mark.slow),
        pytest.param("D", 1000, 16, 0.014, 18, marks=pytest.mark.slow),
    ],
)
def test_dts_agrees_with_an_independent_implementation(
    name, num_rollouts, num_seeds, spread, count_spread, horvitz_thompson
):
    """Equal within three standard errors, both in total variation and in how many distinct sequences were found.

    The count hardly varies, so it tells rules apart that B's total variation cannot: widening by distinct children
    instead of draws finds 253 sequences there, not 228.
    """
    model = toy(name)
    options = HORVITZ_THOMPSON if horvitz_thompson else MULTISET
    runs = run_seeds(
        name, "dts", range(2000, 2000 + num_seeds), num_rollouts=num_rollouts, **options
    )
    laws = [law_of(run, model) for run in runs]
    expected = [
        dts_law(model, num_rollouts, np.random.default_rng(seed), horvitz_thompson)
        for seed in range(num_seeds)
    ]
    within = 3 * np.sqrt(2 / num_seeds)
    errors, expected_errors = (
        [total_variation(law, model) for law in group] for group in (laws, expected)
    )
    assert np.mean(errors) == pytest.approx(np.mean(expected_errors), abs=within * spread)
    counts, expected_counts = (
        [np.count_nonzero(law) for law in group] for group in (laws, expected)
    )
    assert np.mean(counts) == pytest.approx(np.mean(expected_counts), abs=within * count_spread)


def test_the_papers_weights_fail_the_acceptance_figures():
    assert (
        mean_total_variation("A", "dts", 300, range(100, 104), weights="multiset", wave_size=1)
        > 0.30
    )
    assert (
        mean_total_variation("A", "dts", 1000, range(100, 104), weights="multiset", wave_size=1)
        > 1e-3
    )


@pytest.mark.parametrize("wave_size", [8, 32])
def test_waves_lose_little(wave_size):
    alone = mean_total_variation("D", "residual_ts", 1000, SEEDS, wave_size=1)
    assert mean_total_variation("D", "residual_ts", 1000, SEEDS, wave_size=wave_size) < alone + 0.02


def test_maxent_ts_with_the_residual_tail_exhausts_and_beats_snis():
    options = {"expansion_k": 2, "wave_size": 1}
    assert mean_total_variation("A", "maxent_ts", 5000, range(100, 102), **options) < 1e-6
    assert mean_total_variation("A", "maxent_ts", 300, SEEDS, **options) < mean_total_variation(
        "A", "snis", 300, SEEDS
    )


def _unbiasedness(wave_size: int, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Z-hat / Z and the plain tree backup's M(root) / Z of many searches of toy U with N = 8."""
    model = toy("U")
    process = TokenProcess(model, model.law, model.length)
    problems = [SearchProblem(i, process.root([0]), model) for i in range(num_runs)]
    options = {
        "num_rollouts": 8,
        "inverse_temperature": model.inverse_temperature,
        "wave_size": wave_size,
    }
    runs = [
        r
        for _, r in run_searches(
            process, problems, method="residual_ts", options=options, seed=1, in_flight=512
        )
    ]
    ratio = np.exp([run.log_z - model.log_z for run in runs])
    roots = [run.tree.nodes[0] for run in runs]
    plain = np.exp(
        [np.logaddexp(root["log_known"], root["log_unknown"]) - model.log_z for root in roots]
    )
    return ratio, plain


@pytest.mark.parametrize("wave_size", [1, 4])
def test_z_hat_is_unbiased_and_the_plain_backup_is_not(wave_size):
    ratio, plain = _unbiasedness(wave_size, 10_000)
    assert abs(ratio.mean() - 1) < 0.02
    assert abs(plain.mean() - 1) > 0.05


def test_the_stated_error_of_log_z_covers_its_spread():
    """Over 400 seeds of toy D the z-scores of Z-hat have about unit spread."""
    model = toy("D")
    process = TokenProcess(model, model.law, model.length)
    problems = [SearchProblem(i, process.root([0]), model) for i in range(400)]
    options = {
        "num_rollouts": 200,
        "inverse_temperature": model.inverse_temperature,
        "wave_size": 8,
    }
    runs = [
        r for _, r in run_searches(process, problems, method="residual_ts", options=options, seed=5)
    ]
    scores = np.array([np.expm1(run.log_z - model.log_z) / run.log_z_error for run in runs])
    assert 0.8 < scores.std() < 1.3


def _unweighted(nodes, leaf):
    """The prototype's mistake: every child counts the same, whatever its prior."""
    node = int(nodes[leaf]["parent"])
    while node >= 0:
        nodes["log_weight"][nodes["parent"] == node] = 0.0
        node = int(nodes[node]["parent"])


def test_an_unweighted_backup_inside_the_product_fails(monkeypatch):
    good = mean_total_variation("A", "dts", 1000, range(100, 102), wave_size=1)
    monkeypatch.setitem(dts.WEIGHTS, "horvitz_thompson", _unweighted)
    assert mean_total_variation("A", "dts", 1000, range(100, 102), wave_size=1) > 0.4 > good
    exact = mean_total_variation("A", "maxent_ts", 5000, range(100, 101), expansion_k=2)
    monkeypatch.setattr(maxent_ts, "weigh_prior", _unweighted)
    assert (
        mean_total_variation("A", "maxent_ts", 5000, range(100, 101), expansion_k=2)
        > 0.3
        > 1e-6
        > exact
    )


class ConstantReward:
    """The same reward for everything."""

    multipliers = {"constant": 1.0}  # noqa: RUF012

    def components(self, samples):
        return {"constant": np.full(len(samples), -1.7)}


@pytest.mark.parametrize("method", ["residual_ts", "dts", "maxent_ts", "mcts"])
def test_a_constant_reward_gives_its_value_at_every_node(method):
    run = run_toy("A", method, 3, reward=ConstantReward(), num_rollouts=100, wave_size=4)
    values = run.tree.nodes["value"][: run.tree.size]
    if method == "residual_ts":
        values = run.tree.soft_values(toy("A").inverse_temperature)
        assert len(values) == run.tree.size and not np.isnan(values).any()
    values = values[~np.isnan(values)]
    assert len(values) > 50
    np.testing.assert_allclose(values, -1.7, atol=1e-9)


@pytest.mark.parametrize("method", ["residual_ts", "maxent_ts"])
def test_exhaustive_search_is_exact(method):
    run = run_toy("A", method, 7, num_rollouts=5000, wave_size=8)
    model = toy("A")
    assert run.exhausted
    assert run.log_z == pytest.approx(model.log_z, abs=1e-6)
    assert len(run.finished) == 625
    np.testing.assert_allclose(law_of(run, model), model.target, atol=1e-9)
    values = run.tree.soft_values(model.inverse_temperature)
    for node in range(run.tree.size):
        tokens = run.tree.tokens(node)
        assert values[node] == pytest.approx(
            model.soft_values[len(tokens)][model.index(tokens)], abs=1e-9
        )


def test_small_lambda_gives_the_prior_mean_and_large_lambda_the_maximum():
    model = toy("A")
    for inverse_temperature, expected, tolerance in [
        (1e-6, float(np.exp(model.log_prior) @ model.rewards), 1e-5),
        (1e4, float(model.rewards.max()), 2e-3),
    ]:
        run = run_toy(
            "A", "residual_ts", 0, num_rollouts=1000, inverse_temperature=inverse_temperature
        )
        assert run.log_z / inverse_temperature == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("method", ["residual_ts", "dts", "maxent_ts"])
def test_samples_follow_the_stated_distribution(method):
    """Frequencies of many samples of one search against its distribution(): systematic, so within one count."""
    count = 20_000
    run = run_toy("A", method, 11, num_rollouts=60, num_samples=count)
    law = dict(run.distribution())
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-9)
    tokens, counts = np.unique([s.tokens for s in run.samples], axis=0, return_counts=True)
    found = {tuple(t.tolist()): c for t, c in zip(tokens, counts, strict=True)}
    assert all(abs(found.get(t, 0) - count * p) <= 1 + 1e-6 for t, p in law.items())


def test_the_fall_draw_beats_the_path_draw_in_total_variation():
    """The law of one fall walk, by enumeration of the tree, against the path draw's (docs/concepts/exactness.md#toys, column "fall")."""
    model = toy("A")
    runs = [run_toy("A", "residual_ts", seed, num_rollouts=300, wave_size=1) for seed in SEEDS]
    falls = [total_variation(_fall_law(run.tree, model), model) for run in runs]
    assert np.mean(falls) == pytest.approx(0.055, abs=0.02)


def test_fall_samples_follow_the_fall_law():
    model = toy("U")
    run = run_toy(
        "U", "residual_ts", 5, num_rollouts=8, wave_size=1, num_samples=20_000, draw="fall"
    )
    plain = run_toy("U", "residual_ts", 5, num_rollouts=8, wave_size=1)
    law = _fall_law(plain.tree, model)
    counts = np.bincount([model.index(s.tokens) for s in run.samples], minlength=len(law))
    expected = law * len(run.samples)
    chi_square = np.sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0])
    assert chi_square < 60  # 26 degrees of freedom: p < 2e-4 above
    assert all(s.reward == model.rewards[model.index(s.tokens)] for s in run.samples)


def _fall_law(tree: Tree, model: Toy) -> np.ndarray:
    """Exact law of a fall walk: child p_c M_c, residual (1 - P_E) R, then p outside E and p below."""
    law = np.zeros(len(model.target))
    mass = np.logaddexp(tree.nodes["log_known"], tree.nodes["log_unknown"])

    def spread(node: int, reach: float) -> None:
        if tree.is_terminal(node):
            law[model.index(tree.tokens(node))] += reach
            return
        children = tree.children(node)
        arms = np.array([tree.nodes["log_prior"][c] + mass[c] for c in children])
        residual = tree.nodes["log_residual"][node] + tree.nodes["log_rate"][node]
        total = np.logaddexp.reduce(np.append(arms, residual))
        for child, arm in zip(children, arms, strict=True):
            spread(child, reach * np.exp(arm - total))
        if residual > -np.inf:
            outside(node, children, reach * np.exp(residual - total))

    def outside(node: int, children: list[int], reach: float) -> None:
        prefix = tree.tokens(node)
        below = model.vocab_size ** (model.length - len(prefix))
        start = model.index(prefix) * below
        conditional = (
            np.exp(model.log_prior[start : start + below]).reshape(model.vocab_size, -1).copy()
        )
        conditional[[tree.nodes["token"][c] for c in children]] = 0.0
        law[start : start + below] += reach * conditional.ravel() / conditional.sum()

    spread(0, 1.0)
    return law


def test_horvitz_thompson_weights_are_the_formula():
    run = run_toy("A", "dts", 1, num_rollouts=50, wave_size=1)
    nodes = run.tree.nodes
    for child in run.tree.children(0):
        p = np.exp(nodes["log_prior"][child])
        expected = p / (1 - (1 - p) ** nodes["draws"][0])
        assert np.exp(nodes["log_weight"][child]) == pytest.approx(expected, rel=1e-12)


def test_smc_is_unbiased_on_toy_u():
    model = toy("U")
    process = TokenProcess(model, model.law, model.length)
    problems = [SearchProblem(i, process.root([0]), _WithPartial()) for i in range(4000)]
    options = {"num_rollouts": 8, "inverse_temperature": 5.0, "segments": 3, "ess_threshold": 0.9}
    runs = [
        r
        for _, r in run_searches(
            process, problems, method="smc", options=options, seed=2, in_flight=512
        )
    ]
    ratio = np.exp([run.log_z - model.log_z for run in runs])
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(len(ratio))


class _WithPartial:
    """Toy U's reward with a potential that is wrong on purpose: unbiasedness must not need a good one."""

    has_partial = True
    multipliers = {"toy": 1.0}  # noqa: RUF012

    def components(self, samples: list[Decoded]):
        return toy("U").components(samples)

    def partial(self, samples: list[Decoded]):
        return np.array([0.3 * sum(s.tokens) for s in samples])


def test_soft_backup_is_the_formula():
    tree = Tree()
    tree.reserve(3)
    from sdt_dist.tree.kernels import add_child

    for token, (log_prior, reward) in enumerate([(np.log(0.5), 1.0), (np.log(0.2), -2.0)]):
        tree.size = add_child(tree.nodes, tree.size, 0, token, log_prior)
        tree.set_reward(tree.size - 1, reward, 3.0)
    soft.backup_soft(tree.nodes, 1, 3.0)
    expected = np.log((0.5 * np.exp(3.0) + 0.2 * np.exp(-6.0)) / 0.7) / 3.0
    assert tree.nodes["value"][0] == pytest.approx(expected, abs=1e-12)


def test_stream_keys_do_not_depend_on_the_process():
    assert stream_key(0, 1, "p", 0, 2) == stream_key(0, 1, "p", 0, 2)
    assert stream_key(0, 1, "p", 0, 2) != stream_key(0, 12, "p", 0)
    assert PARAMETERS["A"][0] == 5
