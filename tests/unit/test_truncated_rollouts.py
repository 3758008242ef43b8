"""Laws of `rollout_max_new_tokens`: cut rollouts valued by the reward's partial form.

See docs/concepts/target.md#methods.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

import sdt_dist as sdt
from sdt_dist.errors import ConfigurationError, RewardError
from sdt_dist.models.interface import interface_process
from sdt_dist.models.loading import load_model
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.rewards.spectral import SpectralReward
from sdt_dist.search.api import run_searches
from sdt_dist.search.methods import validate_options
from sdt_dist.search.session import SearchProblem
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.tree.tree import TERMINAL, Tree
from tests.search_helpers import PARAMETERS, run_toy, toy
from tests.unit.test_search_counting import PROMPT, InstrumentedLM

METHODS = ["dts", "dts_star", "maxent_ts", "mcts"]
WALKING = ["dts", "maxent_ts"]


class SoftPartial:
    """A toy's reward whose partial form is the exact soft value V(prefix), remembering what it was asked."""

    has_partial = True
    multipliers = {"toy": 1.0}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.model = toy(name)
        self.finished: list[tuple[int, ...]] = []
        self.unfinished: list[list[tuple[int, ...]]] = []

    def components(self, samples):
        self.finished += [sample.tokens for sample in samples]
        return self.model.components(samples)

    def partial(self, samples):
        self.unfinished.append([sample.tokens for sample in samples])
        return np.array([self.value(sample.tokens) for sample in samples])

    def value(self, tokens) -> float:
        return float(self.model.soft_values[len(tokens)][self.model.index(tokens)])


class Fours:
    """Number of tokens equal to 4, so far or in the end."""

    has_partial = True
    multipliers = {"fours": 1.0}  # noqa: RUF012

    def components(self, samples):
        return {"fours": self.partial(samples)}

    def partial(self, samples):
        return np.array([float(sample.tokens.count(4)) for sample in samples])


def run_cut(name: str, method: str, seed: int, num_rollouts: int, cap: int | None = 1, **options):
    options = {"wave_size": 4, "reward": SoftPartial(name)} | options
    return run_toy(
        name, method, seed, num_rollouts=num_rollouts, rollout_max_new_tokens=cap, **options
    )


def evaluated_children(tree: Tree, node: int) -> list[int]:
    return [child for child in tree.children(node) if not np.isnan(tree.nodes["value"][child])]


def inner_error(method: str, num_rollouts: int, cap: int | None) -> float:
    """Mean |value - V| of toy C's nodes with at least ten visits, down to depth 2, weighted by visits."""
    reward = SoftPartial("C")
    errors = []
    for seed in range(4):
        nodes = (tree := run_cut("C", method, seed, num_rollouts, cap).tree).nodes
        seen = [n for n in range(tree.size) if nodes["depth"][n] <= 2 and nodes["visits"][n] >= 10]
        wrong = [abs(nodes["value"][n] - reward.value(tree.tokens(n))) for n in seen]
        errors.append(np.average(wrong, weights=nodes["visits"][seen]))
    return float(np.mean(errors))


@pytest.mark.parametrize("method", ["dts", "dts_star", "maxent_ts"])
def test_exact_guesses_converge_to_exact_values_and_sooner_than_full_rollouts(method):
    """The partial form is V itself: with it a walk of one token tells more than a walk to the end does."""
    early = inner_error(method, 100, 1)
    assert early < 0.7 * inner_error(method, 100, None)
    assert inner_error(method, 2000, 1) < 0.7 * early


def test_exact_guesses_give_exact_values_where_all_children_have_one():
    """Soft Bellman: an enumerated node is exact once all its children are, finished or not."""
    reward = SoftPartial("U")
    cut_below = 0
    for tree in (run_cut("U", "maxent_ts", seed, 48, expansion_k=3).tree for seed in range(8)):
        exact: dict[int, bool] = {}
        for node in reversed(range(tree.size)):
            children = evaluated_children(tree, node)
            is_leaf = not children and not np.isnan(tree.nodes["value"][node])
            exact[node] = is_leaf or (
                len(children) == 3 and all(exact[child] for child in children)
            )
        for node in (node for node in range(tree.size) if exact[node]):
            assert tree.nodes["value"][node] == pytest.approx(
                reward.value(tree.tokens(node)), abs=1e-9
            )
            cut_below += any(not tree.is_terminal(child) for child in tree.children(node))
    assert cut_below > 10


def test_an_exhausted_search_is_exact_whatever_the_partial_form_says():
    run = run_cut("A", "maxent_ts", 0, 5000, reward=Misleading("A"))
    assert run.exhausted
    assert run.tree.nodes["value"][0] == pytest.approx(toy("A").soft_values[0][0], abs=1e-9)
    assert run.probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    law = {sample.tokens: p for sample, p in zip(run.finished, run.probabilities, strict=True)}
    assert all(
        p == pytest.approx(toy("A").target[toy("A").index(t)], abs=1e-9) for t, p in law.items()
    )


class Misleading(SoftPartial):
    """A partial form that is wrong everywhere."""

    def value(self, tokens) -> float:
        return 2.0 - super().value(tokens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cap", [1, 3])
def test_a_value_is_the_partial_form_until_there_are_children_to_back_up(method, cap):
    run = run_cut("C", method, 1, 150, cap)
    reward = SoftPartial("C")
    tree = run.tree
    counts = np.zeros(2)
    for node in np.flatnonzero(~np.isnan(tree.nodes["value"][: tree.size])).tolist():
        children = evaluated_children(tree, node)
        expected = (
            backed_up(method, tree, node, children) if children else reward.value(tree.tokens(node))
        )
        assert tree.nodes["value"][node] == pytest.approx(expected, abs=1e-9)
        counts[bool(children)] += not tree.is_terminal(node)
    assert counts.min() > 20


def backed_up(method: str, tree: Tree, node: int, children: list[int]) -> float:
    strength = toy("C").inverse_temperature
    nodes = tree.nodes
    values = nodes["value"][children]
    if method == "mcts":
        return float(np.average(values, weights=nodes["visits"][children]))
    weights = nodes["log_weight"][children]
    if method == "maxent_ts":  # all mass that no evaluated child stands for has their mean
        rest = np.log1p(-min(np.exp(nodes["log_prior"][children]).sum(), 1 - 1e-16))
        mean = logsumexp(strength * values) - np.log(len(children))
        values = np.append(values, mean / strength)
        weights = np.append(nodes["log_prior"][children], rest)
    return float(logsumexp(weights + strength * values) - logsumexp(weights)) / strength


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_reward_gives_its_value_at_every_node(method):
    run = run_cut("C", method, 3, 100, reward=Constant())
    values = run.tree.nodes["value"][: run.tree.size]
    assert (~np.isnan(values)).sum() > 50
    np.testing.assert_allclose(values[~np.isnan(values)], -1.7, atol=1e-9)


class Constant:
    """The same for everything, finished or not."""

    has_partial = True
    multipliers = {"constant": 1.0}  # noqa: RUF012

    def components(self, samples):
        return {"constant": self.partial(samples)}

    def partial(self, samples):
        return np.full(len(samples), -1.7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cap", [1, 2, 4])
def test_a_walk_pays_for_at_most_its_cap(method, cap):
    """Every row that a walk needs above its rollout was computed by an earlier one; forwards are counted as they are."""
    model = InstrumentedLM()
    length = 7
    wave = 4
    options = {"num_rollouts": 60, "wave_size": wave, "rollout_max_new_tokens": cap}
    process = interface_process(model, length)
    problem = SearchProblem(0, process.root(list(PROMPT)), Fours())
    ((_, run),) = run_searches(process, [problem], method=method, options=options, seed=4)
    assert run.nfe == run.model_calls == len(model.asked) == len(set(model.asked))
    assert run.rollouts == 60, "no last wave was needed"
    assert run.nfe <= cap * 60
    for sample in [*run.samples, run.best, *run.finished]:
        assert sample.reward == sample.tokens.count(4)
        assert sample.finish_reason == "eos" or len(sample.tokens) == length


@pytest.mark.parametrize("method", METHODS)
def test_the_reward_scores_finished_samples_and_its_partial_form_unfinished_ones_of_one_length(
    method,
):
    reward = SoftPartial("C")
    run = run_cut("C", method, 2, 150, 2, reward=reward)
    assert (
        len(reward.finished)
        == len(set(reward.finished))
        == run.cost.reward_calls
        == len(run.finished)
    )
    assert all(len(tokens) == 6 for tokens in reward.finished)
    assert all(len({len(tokens) for tokens in batch}) == 1 for batch in reward.unfinished)
    cut = [tokens for batch in reward.unfinished for tokens in batch]
    assert len(cut) == len(set(cut)) and max(map(len, cut)) < 6
    rewards = toy("C").rewards
    assert all(
        s.reward == rewards[toy("C").index(s.tokens)]
        for s in [*run.samples, run.best, *run.finished]
    )


@pytest.mark.parametrize("method", WALKING)
def test_final_walks_compete_among_children_with_finished_samples_only(method):
    run = run_cut("C", method, 5, 150)
    tree = run.tree
    strength = toy("C").inverse_temperature
    law: dict[tuple[int, ...], float] = {}

    def finishes(node: int) -> bool:
        if tree.is_terminal(node):
            return not np.isnan(tree.nodes["value"][node])
        return any(finishes(child) for child in tree.children(node))

    def spread(node: int, reach: float) -> None:
        if tree.is_terminal(node):
            law[tree.tokens(node)] = reach
            return
        arms = [child for child in tree.children(node) if finishes(child)]
        weights = tree.nodes["log_weight"][arms] + strength * tree.nodes["value"][arms]
        for child, share in zip(arms, np.exp(weights - logsumexp(weights)), strict=True):
            spread(child, reach * share)

    spread(0, 1.0)
    found = dict(run.distribution())
    assert found.keys() == law.keys()
    assert all(found[tokens] == pytest.approx(p, abs=1e-12) for tokens, p in law.items())
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert any(
        not finishes(child)
        for child in range(tree.size)
        if not np.isnan(tree.nodes["value"][child])
    )


@pytest.mark.parametrize(("method", "by"), [("dts_star", "value"), ("mcts", "visits")])
def test_greedy_walks_end_on_a_finished_sample(method, by):
    run = run_cut("C", method, 5, 100)
    tree = run.tree
    ends = {
        tree.tokens(n)
        for n in np.flatnonzero(tree.nodes["status"][: tree.size] == TERMINAL).tolist()
    }
    ends &= {sample.tokens for sample in run.finished}
    prefix: tuple[int, ...] = ()
    nodes = {tree.tokens(n): n for n in range(tree.size)}
    while len(prefix) < 6:
        steps = {tokens[: len(prefix) + 1] for tokens in ends if tokens[: len(prefix)] == prefix}
        prefix = max(steps, key=lambda tokens: tree.nodes[by][nodes[tokens]])
    assert run.samples[0].tokens == prefix


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "budget", [{"num_rollouts": 3}, {"max_nfe": 4}, {"time_budget_s": 1e-9}, {"num_rollouts": 1}]
)
def test_a_budget_too_small_to_finish_anything_gets_one_last_wave_to_the_end(method, budget):
    run = run_toy("C", method, 0, SoftPartial("C"), wave_size=2, rollout_max_new_tokens=1, **budget)
    last = min(2, budget.get("num_rollouts", 2))
    before = run.rollouts - last
    assert before >= 1 and (before == budget.get("num_rollouts", before))
    assert 1 <= len(run.finished) <= last
    assert run.nfe <= before + last * 6
    assert all(
        s.reward == toy("C").rewards[toy("C").index(s.tokens)] for s in [*run.samples, run.best]
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wave_size", [1, 4])
def test_a_cap_that_never_cuts_changes_nothing_but_the_claim_of_log_z(method, wave_size):
    capped = run_cut("C", method, 6, 60, 6, wave_size=wave_size)
    plain = run_cut("C", method, 6, 60, None, wave_size=wave_size)
    assert capped.samples == plain.samples and capped.finished == plain.finished
    assert (capped.nfe, capped.model_calls, capped.rollouts) == (plain.nfe, plain.model_calls, 60)
    for name, values in plain.tree.arrays().items():
        np.testing.assert_array_equal(capped.tree.arrays()[name], values, err_msg=name)
    assert capped.log_z is None and (plain.log_z is not None) == (method in WALKING)


def resumed(method: str, saved: Snapshot, **options):
    model = Toy(*PARAMETERS["C"])
    process = TokenProcess(model, model.law, model.length)
    problem = SearchProblem(0, process.root([0]), SoftPartial("C"))
    options = {"inverse_temperature": model.inverse_temperature, "wave_size": 4} | options
    ((_, outcome),) = run_searches(
        process, [problem], method=method, options=options, seed=3, resume=saved
    )
    return outcome


@pytest.mark.parametrize("method", METHODS)
def test_resuming_equals_never_having_stopped(method, tmp_path):
    whole = run_cut("C", method, 3, 140, 2)
    half = run_cut("C", method, 3, 80, 2)
    assert half.rollouts == 80, "no last wave was needed"
    path = half.snapshot.save(tmp_path / "search.npz")
    result = resumed(method, Snapshot.load(path), num_rollouts=140, rollout_max_new_tokens=2)
    assert result.samples == whole.samples and result.finished == whole.finished
    assert (result.rollouts, result.cost.reward_calls, result.ess) == (
        140,
        whole.cost.reward_calls,
        whole.ess,
    )
    for name, values in whole.tree.arrays().items():
        np.testing.assert_array_equal(result.tree.arrays()[name], values, err_msg=name)
    with pytest.raises(ConfigurationError, match="rollout_max_new_tokens"):
        resumed(method, Snapshot.load(path), num_rollouts=140, rollout_max_new_tokens=1)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_that_needed_its_last_wave_goes_on_from_there(method):
    short = run_cut("C", method, 3, 4, 1)
    assert short.rollouts == 8
    longer = resumed(method, short.snapshot, num_rollouts=80, rollout_max_new_tokens=1)
    assert longer.rollouts == 80 and longer.nfe > short.nfe
    assert longer.finished[: len(short.finished)] == short.finished


@pytest.mark.parametrize("method", METHODS)
def test_waves_and_companions_keep_their_draws(method):
    """A problem's search is the same alone and beside others."""
    model = Toy(*PARAMETERS["C"])
    options = {"num_rollouts": 60, "rollout_max_new_tokens": 2}

    def samples(indices: list[int]):
        process = TokenProcess(model, model.law, model.length)
        problems = [SearchProblem(i, process.root([i % 5]), SoftPartial("C")) for i in indices]
        runs = run_searches(process, problems, method=method, options=options, seed=9)
        return {i: (run.samples, run.nfe) for i, run in runs}

    assert samples([3])[3] == samples([1, 2, 3, 4])[3]


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_without_a_partial_form_is_refused_before_any_model_call(method):
    model = InstrumentedLM()
    options = {"num_rollouts": 4, "rollout_max_new_tokens": 1}
    with pytest.raises(
        ConfigurationError, match=r"rollout_max_new_tokens: 1.*length_of.*partial form"
    ):
        sdt.search(model, list(PROMPT), length_of, method=method, max_new_tokens=4, **options)
    assert not model.asked


def length_of(samples):
    return [float(len(tokens)) for tokens in samples]


@pytest.mark.parametrize("method", METHODS)
def test_an_undefined_partial_form_stops_the_problem(method):
    reward = SoftPartial("C")
    reward.value = lambda tokens: float("nan")
    with pytest.raises(RewardError, match="partial form"):
        run_cut("C", method, 0, 8, reward=reward)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("residual_ts", {}, ["rollout_max_new_tokens", "residual_ts"]),
        ("smc", {}, ["rollout_max_new_tokens", "smc"]),
        ("dts", {"block_size": 2}, ["rollout_max_new_tokens=2", "block_size", "not both"]),
        (
            "dts_star",
            {"branch_depths": [1]},
            ["rollout_max_new_tokens=2", "branch_depths", "not both"],
        ),
        ("maxent_ts", {"block_size": 2}, ["rollout_max_new_tokens=2", "block_size", "not both"]),
        (
            "mcts",
            {"rollout_max_new_tokens": 0},
            ["rollout_max_new_tokens", "0", "greater than or equal to 1"],
        ),
        ("dts", {"rollout_max_new_tokens": 1.5}, ["rollout_max_new_tokens", "1.5"]),
    ],
)
def test_where_the_option_has_no_meaning_it_is_refused(method, options, words):
    with pytest.raises(ConfigurationError) as error:
        validate_options(method, {"rollout_max_new_tokens": 2} | options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cap", [9, 17])
def test_series_of_every_length_get_the_spectral_rewards_partial_form(method, cap):
    """As in smc: 0 below 16 values, the distance of what is there from then on."""
    history = 10 + np.sin(np.arange(120) / 4) + 0.1 * np.random.default_rng(0).standard_normal(120)
    reward = SpectralReward(history)
    options = {"num_rollouts": 24, "rollout_max_new_tokens": cap}
    run = sdt.search(
        load_model("bundled"), history, reward, method=method, max_new_tokens=24, **options
    )
    nodes = run.tree.nodes[: run.tree.size]
    leaves = nodes[
        (nodes["first_child"] < 0) & ~np.isnan(nodes["value"]) & (nodes["status"] != TERMINAL)
    ]
    assert all((leaf["value"] == 0) == (leaf["depth"] < 16) for leaf in leaves)
    assert len(leaves) > 3 and leaves["depth"].max() >= cap
    assert all(
        sample.reward == pytest.approx(reward.score([sample])[0], abs=1e-9)
        for sample in run.finished
    )
