"""Honest counting, and what a result may claim: every method against an instrumented model.

See docs/concepts/exactness.md#cost.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.errors import ConfigurationError, ContextError, RewardError
from sdt_dist.models.interface import interface_process
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import PriorLaw
from sdt_dist.search.api import run_searches
from sdt_dist.search.methods import method_names, validate_options
from sdt_dist.search.session import SearchProblem
from tests.search_helpers import PARAMETERS, run_toy, toy

EOS = 2
PROMPT = (5, 1, 3)


class InstrumentedLM:
    """A small language model with an end token that remembers every sequence it was asked about."""

    vocab_size = 6
    eos_token_id = EOS

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def get_next_token_logits(self, token_sequence: list[int]) -> np.ndarray:
        self.asked.append(tuple(token_sequence))
        rng = np.random.default_rng([len(token_sequence), *token_sequence])
        return rng.standard_normal(self.vocab_size)


class CountingReward:
    """Number of tokens equal to 4, remembering what it was called with."""

    multipliers = {"fours": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def components(self, samples):
        self.seen += [sample.tokens for sample in samples]
        return {"fours": np.array([float(sample.tokens.count(4)) for sample in samples])}


class FoursFlow:
    """F = half the number of tokens equal to 4."""

    identity = "fours"

    def log_tilts(self, states, inverse_temperature, log_prob):
        counts = [[tokens.count(4) + (token == 4) for token in range(6)] for _, tokens in states]
        return 0.5 * inverse_temperature * np.array(counts, dtype=np.float64)

    def values(self, states, inverse_temperature):
        return np.array([0.5 * tokens.count(4) for _, tokens in states])


def run_lm(case: str, max_new_tokens: int = 5, **options):
    method = case.split(":")[0]
    model = InstrumentedLM()
    reward = CountingReward()
    process = interface_process(model, max_new_tokens)
    problem = SearchProblem(0, process.root(list(PROMPT)), reward)
    flow = FoursFlow() if method == "s_adt" else None
    ((_, result),) = run_searches(
        process, [problem], method=method, options=options, seed=4, flow=flow
    )
    return model, reward, result


OPTIONS = {name: {"num_rollouts": 24, "num_samples": 6} for name in method_names()}
TREES = ["mcts", "dts", "dts_star", "maxent_ts", "residual_ts"]
OPTIONS |= {name: OPTIONS[name] | {"wave_size": 4} for name in TREES}
USES = {
    "s_adt": {},
    "s_adt:mix": {"alpha": 0.5, "proposal": False},
    "s_adt:leaf values": {"leaf_values": True, "draw": "fall"},
    "s_adt:all": {"leaf_values": True, "draw": "fall", "alpha": 1.0, "alpha_decay": None},
}
OPTIONS |= {
    case: {"num_rollouts": 24, "num_samples": 6, "wave_size": 4} | uses
    for case, uses in USES.items()
}
CASES = [*method_names(), *USES]
OPTIONS["beam"] = {"beam_width": 4, "num_samples": 4}


@pytest.mark.parametrize("method", CASES)
def test_an_instrumented_model_counts_what_is_reported(method):
    model, _, result = run_lm(method, **OPTIONS[method])
    assert result.nfe == len(model.asked)
    assert result.model_calls == len(model.asked)
    assert len(set(model.asked)) == len(model.asked), "a state was computed twice"


@pytest.mark.parametrize("method", CASES)
def test_the_reward_is_called_once_per_distinct_finished_sample(method):
    _, reward, result = run_lm(method, **OPTIONS[method])
    assert len(reward.seen) == result.cost.reward_calls == len(result.finished)
    finished = [(s.tokens, s.finish_reason) for s in result.finished]
    assert len(set(finished)) == len(finished)


@pytest.mark.parametrize("method", CASES)
def test_each_reported_reward_and_log_prob_belongs_to_its_sample(method):
    model, _, result = run_lm(method, **OPTIONS[method])
    for sample in [*result.samples, result.best]:
        assert sample.reward == sample.tokens.count(4)
        assert sample.log_prob == pytest.approx(_log_prob(model, sample), abs=1e-9)
    assert result.best.reward == max(s.reward for s in result.finished)


def _log_prob(model: InstrumentedLM, sample) -> float:
    """log p by the model itself, the end token included where there was one."""
    tokens = [*sample.tokens, *([EOS] if sample.finish_reason == "eos" else [])]
    total = 0.0
    for i, token in enumerate(tokens):
        logits = model.get_next_token_logits([*PROMPT, *tokens[:i]])
        total += logits[token] - np.logaddexp.reduce(logits)
    return total


@pytest.mark.parametrize("method", CASES)
def test_the_prompt_is_never_scored_and_never_counts(method):
    _, reward, result = run_lm(method, max_new_tokens=3, **OPTIONS[method])
    assert all(len(tokens) <= 3 for tokens in reward.seen)
    assert any(len(tokens) == 3 for tokens in reward.seen) or method in ("greedy", "beam")
    for sample in result.finished:
        assert EOS not in sample.tokens
        assert (
            sample.finish_reason == ("length" if len(sample.tokens) == 3 else "eos")
            or len(sample.tokens) == 3
        )


@pytest.mark.parametrize("method", ["best_of_n", "snis", *TREES])
def test_equal_nfe_within_one_wave(method):
    """On a model without an end token, every method spends its max_nfe to within one wave of full rollouts."""
    length = PARAMETERS["C"][1]
    wave = 4
    options = {"max_nfe": 600, "num_samples": 4, "inverse_temperature": 1.0}
    if method in TREES:
        options["wave_size"] = wave
    result = run_toy("C", method, 0, **options)
    assert 600 - wave * length <= result.nfe <= 600 + wave * length


@pytest.mark.parametrize("method", ["smc", "beam"])
def test_methods_of_fixed_width_never_exceed_their_nfe(method):
    """Particles and beams that share a state share its row, so these may end below their budget."""
    result = run_toy("C", method, 0, max_nfe=600, num_samples=4, inverse_temperature=1.0)
    assert 200 <= result.nfe <= 600 + PARAMETERS["C"][1]


@pytest.mark.parametrize("method", method_names())
def test_same_seed_same_samples_alone_and_beside_companions(method):
    model = Toy(*PARAMETERS["C"])
    options = {"inverse_temperature": 5.0, "num_samples": 6}
    if method not in ("greedy", "sample"):
        options["num_rollouts"] = 30

    def samples(indices: list[int]) -> dict[int, list]:
        process = TokenProcess(model, model.law, model.length)
        problems = [SearchProblem(i, process.root([i % 5]), model) for i in indices]
        runs = run_searches(process, problems, method=method, options=options, seed=9)
        return {i: [(s.tokens, s.reward, s.log_prob) for s in run.samples] for i, run in runs}

    beside = samples(list(range(16)))
    other = samples([3, 30, 31, 32, 7])
    for index in (3, 7):
        assert samples([index])[index] == beside[index] == other[index]


def test_different_problems_and_seeds_give_different_samples():
    first = [s.tokens for s in run_toy("C", "sample", 0, num_samples=6).samples]
    assert first != [s.tokens for s in run_toy("C", "sample", 1, num_samples=6).samples]
    assert first != [s.tokens for s in run_toy("C", "sample", 0, index=1, num_samples=6).samples]


def test_a_time_budget_stops_cleanly_and_gives_up_the_claim():
    result = run_toy("C", "residual_ts", 0, time_budget_s=0.05, wave_size=4)
    assert result.rollouts >= 4
    assert result.samples
    assert not result.log_z_unbiased


def test_a_fixed_number_of_rollouts_claims_an_unbiased_z():
    assert run_toy("C", "residual_ts", 0, num_rollouts=20).log_z_unbiased
    assert not run_toy("C", "residual_ts", 0, max_nfe=60).log_z_unbiased


class BrokenReward:
    """NaN for one sequence in three, or the wrong shape."""

    multipliers = {"broken": 1.0}  # noqa: RUF012

    def __init__(self, values) -> None:
        self.values = values

    def components(self, samples):
        return {"broken": self.values(len(samples))}


@pytest.mark.parametrize(
    "values",
    [
        lambda n: np.where(np.arange(n) % 3, 0.0, np.nan),
        lambda n: np.full(n, np.inf),
        lambda n: np.zeros(n + 1),
    ],
)
def test_a_broken_reward_stops_its_problem_and_no_other(values):
    model = toy("U")
    process = TokenProcess(model, model.law, model.length)
    problems = [
        SearchProblem(0, process.root([0]), BrokenReward(values)),
        SearchProblem(1, process.root([0]), model),
    ]
    outcomes = dict(
        run_searches(process, problems, method="snis", options={"num_rollouts": 10}, seed=0)
    )
    assert isinstance(outcomes[0], RewardError)
    assert "BrokenReward" in str(outcomes[0])
    assert len(outcomes[1].samples) == 8


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("dts", {"num_rolouts": 3}, ["num_rolouts", "num_rollouts"]),
        ("dts", {"num_rollouts": 0}, ["num_rollouts", "0", "greater than or equal to 1"]),
        ("dts", {"num_rollouts": "many"}, ["num_rollouts", "many"]),
        ("residual_ts", {"block_size": 4}, ["block_size", "residual_ts"]),
        ("residual_ts", {"branch_depths": [0]}, ["branch_depths"]),
        ("snis", {"inverse_temperature": -1.0}, ["inverse_temperature", "-1.0"]),
        ("dst", {}, ["dst", "Did you mean", "dts"]),
    ],
)
def test_wrong_options_name_the_field_the_value_and_what_is_allowed(method, options, words):
    with pytest.raises(ConfigurationError) as error:
        validate_options(method, options)
    assert all(word in str(error.value) for word in words)


def test_unusable_prompts_are_refused():
    process = interface_process(InstrumentedLM(), 3)
    for prompt in ([], [9], "text"):
        with pytest.raises(ContextError):
            process.root(prompt)


def test_a_law_that_cannot_be_sampled_is_refused():
    for law in (
        PriorLaw((0, 9)),
        PriorLaw((0, 6), sampling_temperature=0.0),
        PriorLaw((0, 6), top_p=0.0),
    ):
        with pytest.raises(ConfigurationError):
            TokenProcess(interface_process(InstrumentedLM(), 3).model, law, 3)


@pytest.mark.parametrize("method", ["sample", "maxent_ts", "residual_ts"])
def test_problems_with_the_same_prompt_pay_as_if_alone(method):
    model = Toy(*PARAMETERS["C"])
    options = OPTIONS[method] | {"inverse_temperature": 5.0}

    def costs(indices: list[int]) -> dict[int, tuple]:
        process = TokenProcess(model, model.law, model.length)
        problems = [SearchProblem(i, process.root([0]), model) for i in indices]
        runs = run_searches(process, problems, method=method, options=options, seed=9)
        return {i: (run.nfe, run.rollouts, run.cost.recomputed_tokens) for i, run in runs}

    assert costs([0, 1, 2])[1] == costs([1])[1]


@pytest.mark.parametrize(
    ("method", "options"),
    [("maxent_ts", {"block_size": 2}), ("dts", {"growth": 0.5}), ("dts_star", {"growth": 0.5})],
)
def test_a_budget_that_cannot_be_spent_ends_the_search(method, options):
    """Once walks reach cached rows only, an nfe budget alone would never be used up."""
    result = run_toy("A", method, 0, max_nfe=100_000, **options)
    assert result.nfe < 100_000 and result.rollouts >= 1000
    assert result.finished
