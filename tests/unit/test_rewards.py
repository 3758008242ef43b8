"""Laws of rewards: zero and invariance of divergences, sums, and bad values through a search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import sdt_dist as sdt
from sdt_dist.errors import ConfigurationError, ContextError, RewardError
from sdt_dist.metrics.forecast import spectral_measures
from sdt_dist.metrics.spectrum import DISTANCES
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.base import CallableReward, Reward
from sdt_dist.rewards.forecast import Bounds, DtwTemplate, Smoothness, Total
from sdt_dist.rewards.spectral import SpectralReward
from sdt_dist.rewards.text import Length
from sdt_dist.search.api import run_searches
from sdt_dist.search.session import SearchProblem
from tests.reward_helpers import HISTORY, SERIES, decoded
from tests.search_helpers import PARAMETERS


@pytest.mark.parametrize("segment", [None, 8, 32])
@pytest.mark.parametrize("copies", [1, 2, 4])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_sample_with_the_reference_spectrum_scores_exactly_zero(distance, copies, segment):
    reward = SpectralReward(np.tile(HISTORY[:32], copies), 3.0, distance, segment)
    assert reward.score(decoded([HISTORY[:32]])).tolist() == [0.0]


@pytest.mark.parametrize(("slope", "offset"), [(3.0, -7.0), (-0.5, 100.0), (1e-3, 2.0)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_divergence_does_not_depend_on_units(distance, slope, offset):
    here = SpectralReward(HISTORY, 1.0, distance).score(decoded(SERIES))
    there = SpectralReward(slope * HISTORY + offset, 1.0, distance).score(
        decoded(slope * SERIES + offset)
    )
    assert np.ptp(here) > 0.1
    np.testing.assert_allclose(there, here, atol=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_divergence_is_positive_and_gamma_is_its_weight(distance):
    noise = np.random.default_rng(2).standard_normal((20, 32)) * np.logspace(-3, 3, 20)[:, None]
    samples = decoded([*noise, *SERIES, *np.sin(np.outer(np.arange(1, 9), np.arange(32) / 3))])
    scores = SpectralReward(HISTORY, 1.0, distance).score(samples)
    assert (scores < 0).all()
    np.testing.assert_allclose(
        SpectralReward(HISTORY, 2.5, distance).score(samples), 2.5 * scores, rtol=1e-12
    )
    assert not SpectralReward(HISTORY, 0.0, distance).score(samples).any()
    assert (
        SpectralReward(HISTORY, 1.0, distance, segment=16).score(samples).tolist()
        == scores.tolist()
    )
    assert (
        SpectralReward(HISTORY, 1.0, distance, segment=32).score(samples).tolist()
        != scores.tolist()
    )


@pytest.mark.parametrize("length", [4, 9, 15, 32])
def test_the_reward_is_minus_the_metric(length):
    samples = SERIES[:3, :length]
    z = (SERIES[:3, :length] - HISTORY.mean()) / HISTORY.std()
    for row, z_row in zip(samples, z, strict=True):
        metric = spectral_measures(z_row[None], (HISTORY - HISTORY.mean()) / HISTORY.std())
        for distance, name in (("wasserstein", "spec_w1_half"), ("log_l1", "log_l1")):
            score = SpectralReward(HISTORY, 1.0, distance).score(decoded([row]))
            assert score == pytest.approx([-metric[name]], rel=1e-9)


@pytest.mark.parametrize(("length", "segment"), [(16, 32), (300, None), (3, None)])
def test_lengths_that_have_no_spectrum_are_refused_not_truncated(length, segment):
    with pytest.raises(ContextError, match=r"segment|history"):
        SpectralReward(HISTORY, 1.0, segment=segment).score(decoded([np.arange(float(length))]))


def test_a_subclass_may_replace_the_task_and_the_divergence():
    class Mine(SpectralReward):
        def task(self, series: np.ndarray) -> np.ndarray:
            return series.max(axis=1)

        def divergence(self, standardised: np.ndarray) -> np.ndarray:
            return standardised.mean(axis=1)

    z_mean = (SERIES.mean(axis=1) - HISTORY.mean()) / HISTORY.std()
    np.testing.assert_allclose(
        Mine(HISTORY, 3.0).score(decoded(SERIES)), SERIES.max(axis=1) - 3.0 * z_mean
    )


def test_sums_and_multiples_keep_every_term_apart():
    parts = [
        Bounds(HISTORY, low=0.0),
        SpectralReward(HISTORY, 2.0),
        Bounds(HISTORY, high=-1.0),
        Total(HISTORY, 5.0),
    ]
    total = parts[0] + 0.5 * parts[1] + 3.0 * (parts[2] + 0.1 * parts[3])
    samples = decoded(SERIES)
    components = total.components(samples)
    assert total.multipliers == pytest.approx(
        {"bounds": 1, "task": 0.5, "spectral": 1, "bounds_2": 3, "total": 0.3}
    )
    assert set(components) == set(total.multipliers)
    by_terms = sum(total.multipliers[name] * term for name, term in components.items())
    by_parts = sum(w * part.score(samples) for w, part in zip([1, 0.5, 3, 0.3], parts, strict=True))
    np.testing.assert_allclose(total.score(samples), by_terms, rtol=1e-12)
    np.testing.assert_allclose(total.score(samples), by_parts, rtol=1e-12)
    assert not np.array_equal(components["bounds"], components["bounds_2"])


def test_no_term_of_a_sum_is_lost_when_names_collide():
    def constant(value: float, name: str) -> Reward:
        return CallableReward(lambda batch: [value] * len(batch), "tokens", name)

    names = ["f", "f", "f_2", "f_2", "f", "f_2_2"]
    total = sum(
        (constant(2.0**i, n) for i, n in enumerate(names[1:], 1)), start=constant(1.0, names[0])
    )
    assert len(total.multipliers) == len(total.components([Decoded((1,))])) == len(names)
    assert total.score([Decoded((1,))]).tolist() == [2.0 ** len(names) - 1]


@pytest.mark.parametrize("factor", [np.nan, np.inf, "2"])
def test_a_factor_that_is_not_a_finite_number_is_refused(factor):
    with pytest.raises(ConfigurationError, match=r"Bounds: factor.*finite number"):
        factor * Bounds(HISTORY, 0.0)


def test_bounds_measure_the_mean_excess_in_standard_deviations_of_the_history():
    soft = Bounds(HISTORY, -1.0, 2.0)
    hard = Bounds(HISTORY, -1.0, 2.0, hard=True, floor=-7.0)
    samples = decoded([[-1.0, 0.0, 2.0, 1.0], [-3.0, 0.0, 4.0, 1.0], [2.0, 2.0, 2.0, 2.0 + 1e-9]])
    np.testing.assert_allclose(
        soft.score(samples), -np.array([0, 4, 1e-9]) / 4 / HISTORY.std(), rtol=1e-6
    )
    assert hard.score(samples).tolist() == [0.0, -7.0, -7.0]


def test_total_is_the_distance_of_the_sum_per_step():
    scores = Total(HISTORY, 10.0).score(
        decoded([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0], [0.0] * 4])
    )
    np.testing.assert_allclose(scores, np.array([0.0, -10.0, -10.0]) / 4 / HISTORY.std())


def test_straight_lines_are_perfectly_smooth_and_parabolas_are_not():
    steps = np.arange(10.0)
    scores = Smoothness(HISTORY).score(decoded([steps, 5 - 3 * steps, np.full(10, 2.0), steps**2]))
    assert scores[:3].tolist() == [0.0, 0.0, 0.0]
    assert scores[3] == pytest.approx(-4 / HISTORY.std() ** 2)
    for horizon in (1, 2):
        assert Smoothness(HISTORY).score(decoded(SERIES[:, :horizon])).tolist() == [0.0] * len(
            SERIES
        )


@pytest.mark.parametrize("length", [1, 5, 200])
def test_the_tail_of_the_history_is_its_own_template(length):
    tail = HISTORY[-length:]
    scores = DtwTemplate(HISTORY).score(decoded([tail, tail + 50.0]))
    assert scores[0] == 0.0
    assert scores[1] < -1.0 / HISTORY.std()


@pytest.mark.parametrize("distance", DISTANCES)
def test_partial_forms_at_full_length_are_the_score(distance):
    bounds = Bounds(HISTORY, low=0.0)
    spectral = SpectralReward(HISTORY, 2.0, distance)
    samples = decoded(SERIES)
    for reward in (bounds, spectral, bounds + 0.5 * spectral):
        assert reward.has_partial
        np.testing.assert_allclose(reward.partial(samples), reward.score(samples), rtol=1e-12)
    with_other = 2.0 * bounds + Total(HISTORY, 0.0)
    np.testing.assert_allclose(with_other.partial(samples), 2.0 * bounds.score(samples), rtol=1e-12)
    with pytest.raises(RewardError, match="Total has no partial form"):
        Total(HISTORY, 0.0).partial(samples)


class SearchableToy:
    """The toy U behind `sdt.search`."""

    def process(self, max_new_tokens: int, **law) -> TokenProcess:
        toy = Toy(*PARAMETERS["U"])
        return TokenProcess(toy, toy.law, max_new_tokens)


def search_toy(reward, **options):
    return sdt.search(
        SearchableToy(), [0], reward, max_new_tokens=3, **({"num_rollouts": 200} | options)
    )


class Lopsided(Reward):
    """0, but `value` for the one sample (2, 1, 0)."""

    multipliers = {"lopsided": 1.0}  # noqa: RUF012

    def __init__(self, value: float) -> None:
        self.value = value

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        return {
            "lopsided": np.array([self.value if s.tokens == (2, 1, 0) else 0.0 for s in samples])
        }


class Misshapen(Lopsided):
    """One number too many, or a column."""

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        return {"lopsided": np.zeros((len(samples), 1) if self.value else len(samples) + 1)}


@pytest.mark.parametrize("method", ["snis", "residual_ts"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_stops_the_search_and_names_reward_and_sample(value, method):
    with pytest.raises(RewardError) as error:
        search_toy(Lopsided(value), method=method)
    assert all(part in str(error.value) for part in ["Lopsided", str(value), "(2, 1, 0)", "finite"])
    with pytest.raises(RewardError, match="lopsided"):
        Lopsided(value).score([Decoded((2, 1, 0)), Decoded((0, 0, 0))])
    assert search_toy(Lopsided(-5.0), method=method).best.reward == 0.0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_wrong_shape_stops_the_search_and_names_the_reward(value):
    with pytest.raises(RewardError, match=r"Misshapen.*lopsided.*shape.*samples"):
        search_toy(Misshapen(value), method="snis")
    with pytest.raises(RewardError, match=r"lopsided.*shape"):
        Misshapen(value).score([Decoded((0, 0, 0))])


class Steered(Lopsided):
    """0, with the partial form that `value` computes from the number of samples."""

    has_partial = True

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        return {"lopsided": np.zeros(len(samples))}

    def partial(self, samples: Sequence[Decoded]) -> np.ndarray:
        return self.value(len(samples))


@pytest.mark.parametrize(
    ("partial", "what"),
    [
        (lambda n: np.full(n, np.nan), "value nan for sample"),
        (lambda n: np.zeros(n + 1), r"shape \(\d+,\) for \d+ samples"),
        (lambda n: ["high"] * n, "numbers"),
        (lambda n: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_smc_refuses_a_bad_partial_form(partial, what):
    for reward in (Steered(partial), 0.5 * Steered(partial) + Length(2)):
        with pytest.raises(RewardError, match=f"problem 0: reward Steered.*{what}"):
            search_toy(reward, method="smc")
    assert search_toy(Steered(np.zeros), method="smc").samples


def missing_key(batch):
    raise KeyError("no such\nkey")


def in_words(batch):
    return ["1.0"] * len(batch)


def nothing(batch):
    return None


def ragged(batch):
    return [[1.0], [1.0, 2.0]]


def up(batch):
    return [np.inf] * len(batch)


def down(batch):
    return [-np.inf] * len(batch)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (missing_key, "KeyError"),
        (in_words, "allowed: numbers"),
        (nothing, "allowed: numbers"),
        (ragged, "ValueError"),
        (up, "value inf"),
        (down, "value -inf"),
    ],
)
def test_a_broken_function_is_named_and_stops_its_own_problem_only(function, what):
    mine = CallableReward(function, "tokens")
    process = SearchableToy().process(3)
    rewards = [mine, Length(3), Length(6) + 2.0 * mine, mine + CallableReward(down, "tokens")]
    problems = [SearchProblem(i, process.root([0]), reward) for i, reward in enumerate(rewards)]
    outcomes = dict(
        run_searches(process, problems, method="snis", options={"num_rollouts": 10}, seed=0)
    )
    for index in (0, 2, 3):
        assert isinstance(outcomes[index], RewardError)
        assert all(
            word in str(outcomes[index]) for word in (f"problem {index}", function.__name__, what)
        )
        assert "\n" not in str(outcomes[index])
    assert outcomes[1].best.reward == 0.0


def test_terms_without_multipliers_and_sums_that_overflow_are_refused():
    class Nameless(Lopsided):
        def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
            return {"other": np.zeros(len(samples))}

    with pytest.raises(RewardError, match=r"Nameless.*\['other'\].*\['lopsided'\]"):
        Nameless(0.0).score([Decoded((0,))])
    huge = CallableReward(lambda batch: [1e308] * len(batch), "tokens", "huge")
    with pytest.raises(RewardError, match=r"huge \+ huge, weighted sum: value inf"):
        (5.0 * huge + 5.0 * huge).score([Decoded((0,))])


def test_a_searched_sum_reports_each_sample_with_its_own_terms():
    def first(sequences: list[list[int]]) -> list[float]:
        return [float(tokens[0]) for tokens in sequences]

    reward = (
        CallableReward(first, "tokens") + 0.5 * Length(6) + 0.25 * CallableReward(first, "tokens")
    )
    for sample in search_toy(reward, method="residual_ts").finished:
        assert sample.components == {
            "first": sample.tokens[0],
            "length": -0.5,
            "first_2": sample.tokens[0],
        }
        assert sample.reward == pytest.approx(1.25 * sample.tokens[0] - 0.25)
