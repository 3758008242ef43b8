"""Laws of rewards: zero and invariance of divergences, sums, bad values through a search, and the REWARD SPEC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest

import sdt_dist as sdt
from sdt_dist.errors import ConfigurationError, ContextError, RewardError
from sdt_dist.metrics.spectrum import DISTANCES
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.base import CallableReward, Reward
from sdt_dist.rewards.forecast import Bounds, DtwTemplate, Smoothness, Total
from sdt_dist.rewards.spec import RewardContext, parse_reward
from sdt_dist.rewards.spectral import SpectralReward
from sdt_dist.rewards.text import Answer, Length, Regex
from tests.search_helpers import PARAMETERS

HISTORY = np.random.default_rng(0).standard_normal(200).cumsum()
SERIES = np.random.default_rng(1).standard_normal((12, 32)).cumsum(axis=1)


def decoded(series) -> list[Decoded]:
    return [Decoded((), series=np.asarray(row, dtype=np.float64)) for row in series]


def texts(*values: str) -> list[Decoded]:
    return [Decoded(tuple(range(len(value))), text=value) for value in values]


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
    there = SpectralReward(slope * HISTORY + offset, 1.0, distance).score(decoded(slope * SERIES + offset))
    assert np.ptp(here) > 0.1
    np.testing.assert_allclose(there, here, atol=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_divergence_is_positive_and_gamma_is_its_weight(distance):
    noise = np.random.default_rng(2).standard_normal((20, 32)) * np.logspace(-3, 3, 20)[:, None]
    samples = decoded([*noise, *SERIES, *np.sin(np.outer(np.arange(1, 9), np.arange(32) / 3))])
    scores = SpectralReward(HISTORY, 1.0, distance).score(samples)
    assert (scores < 0).all()
    np.testing.assert_allclose(SpectralReward(HISTORY, 2.5, distance).score(samples), 2.5 * scores, rtol=1e-12)
    assert not SpectralReward(HISTORY, 0.0, distance).score(samples).any()
    assert SpectralReward(HISTORY, 1.0, distance, segment=16).score(samples).tolist() == scores.tolist()
    assert SpectralReward(HISTORY, 1.0, distance, segment=32).score(samples).tolist() != scores.tolist()


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
    np.testing.assert_allclose(Mine(HISTORY, 3.0).score(decoded(SERIES)), SERIES.max(axis=1) - 3.0 * z_mean)


def test_sums_and_multiples_keep_every_term_apart():
    parts = [Bounds(HISTORY, low=0.0), SpectralReward(HISTORY, 2.0), Bounds(HISTORY, high=-1.0), Total(HISTORY, 5.0)]
    total = parts[0] + 0.5 * parts[1] + 3.0 * (parts[2] + 0.1 * parts[3])
    samples = decoded(SERIES)
    components = total.components(samples)
    assert total.multipliers == pytest.approx({"bounds": 1, "task": 0.5, "spectral": 1, "bounds_2": 3, "total": 0.3})
    assert set(components) == set(total.multipliers)
    by_terms = sum(total.multipliers[name] * term for name, term in components.items())
    by_parts = sum(w * part.score(samples) for w, part in zip([1, 0.5, 3, 0.3], parts, strict=True))
    np.testing.assert_allclose(total.score(samples), by_terms, rtol=1e-12)
    np.testing.assert_allclose(total.score(samples), by_parts, rtol=1e-12)
    assert not np.array_equal(components["bounds"], components["bounds_2"])


def test_bounds_measure_the_mean_excess_in_standard_deviations_of_the_history():
    soft, hard = Bounds(HISTORY, -1.0, 2.0), Bounds(HISTORY, -1.0, 2.0, hard=True, floor=-7.0)
    samples = decoded([[-1.0, 0.0, 2.0, 1.0], [-3.0, 0.0, 4.0, 1.0], [2.0, 2.0, 2.0, 2.0 + 1e-9]])
    np.testing.assert_allclose(soft.score(samples), -np.array([0, 4, 1e-9]) / 4 / HISTORY.std(), rtol=1e-6)
    assert hard.score(samples).tolist() == [0.0, -7.0, -7.0]


def test_total_is_the_distance_of_the_sum_per_step():
    scores = Total(HISTORY, 10.0).score(decoded([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0], [0.0] * 4]))
    np.testing.assert_allclose(scores, np.array([0.0, -10.0, -10.0]) / 4 / HISTORY.std())


def test_straight_lines_are_perfectly_smooth_and_parabolas_are_not():
    steps = np.arange(10.0)
    scores = Smoothness(HISTORY).score(decoded([steps, 5 - 3 * steps, np.full(10, 2.0), steps**2]))
    assert scores[:3].tolist() == [0.0, 0.0, 0.0]
    assert scores[3] == pytest.approx(-4 / HISTORY.std() ** 2)


@pytest.mark.parametrize("length", [1, 5, 200])
def test_the_tail_of_the_history_is_its_own_template(length):
    tail = HISTORY[-length:]
    scores = DtwTemplate(HISTORY).score(decoded([tail, tail + 50.0]))
    assert scores[0] == 0.0
    assert scores[1] < -1.0 / HISTORY.std()


@pytest.mark.parametrize("distance", DISTANCES)
def test_partial_forms_at_full_length_are_the_score(distance):
    bounds, spectral = Bounds(HISTORY, low=0.0), SpectralReward(HISTORY, 2.0, distance)
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
    return sdt.search(SearchableToy(), [0], reward, max_new_tokens=3, **({"num_rollouts": 200} | options))


class Lopsided(Reward):
    """0, but `value` for the one sample (2, 1, 0)."""

    multipliers = {"lopsided": 1.0}  # noqa: RUF012

    def __init__(self, value: float) -> None:
        self.value = value

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        return {"lopsided": np.array([self.value if s.tokens == (2, 1, 0) else 0.0 for s in samples])}


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


def test_a_searched_sum_reports_each_sample_with_its_own_terms():
    def first(sequences: list[list[int]]) -> list[float]:
        return [float(tokens[0]) for tokens in sequences]

    reward = CallableReward(first, "tokens") + 0.5 * Length(6) + 0.25 * CallableReward(first, "tokens")
    for sample in search_toy(reward, method="residual_ts").finished:
        assert sample.components == {"first": sample.tokens[0], "length": -0.5, "first_2": sample.tokens[0]}
        assert sample.reward == pytest.approx(1.25 * sample.tokens[0] - 0.25)


def test_rewards_see_the_history_or_the_prompt_and_nothing_else(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def spy(series, context):\n    return [context.history.sum()] * len(series)\n")
    reward = parse_reward(f"{file}:spy").build(RewardContext(history=HISTORY))
    assert reward.score(decoded(SERIES)).tolist() == [HISTORY.sum()] * len(SERIES)
    assert {field.name for field in fields(RewardContext)} == {"history", "prompt"}


SPECS = {
    "spectral:gamma=1+nonneg": lambda h: SpectralReward(h, 1.0) + Bounds(h, low=0.0),
    "spectral:gamma=1+0.5*nonneg": lambda h: SpectralReward(h, 1.0) + 0.5 * Bounds(h, low=0.0),
    "spectral:gamma=2,distance=kl,segment=8": lambda h: SpectralReward(h, 2.0, "kl", 8),
    "2*spectral:distance=wasserstein + dtw": lambda h: 2.0 * SpectralReward(h, 1.0, "wasserstein") + DtwTemplate(h),
    "bounds:low=0,high=80": lambda h: Bounds(h, 0.0, 80.0),
    "bounds:low=-1,hard=false": lambda h: Bounds(h, low=-1.0),
    "bounds:low=-1,high=1,hard=true,floor=-5": lambda h: Bounds(h, -1.0, 1.0, True, -5.0),
    "nonneg:hard=true,floor=-7": lambda h: Bounds(h, low=0.0, hard=True, floor=-7.0),
    "total:value=1e+2": lambda h: Total(h, 100.0),
    "-1*smoothness": lambda h: -1.0 * Smoothness(h),
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_the_reward_it_writes_down(spec):
    factory, want = parse_reward(spec), SPECS[spec](HISTORY)
    have = factory.build(RewardContext(history=HISTORY))
    assert factory.view == "series"
    assert have.multipliers == want.multipliers
    np.testing.assert_array_equal(have.score(decoded(SERIES)), want.score(decoded(SERIES)))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("specral:gamma=1", ["specral", "Did you mean 'spectral'"]),
        ("nonneg+0.5*smothness", ["smothness", "Did you mean 'smoothness'"]),
        ("spectral:gama=2", ["spectral", "gama=2", "gamma, distance, segment"]),
        ("spectral:gamma", ["spectral", "'gamma'", "allowed"]),
        ("smoothness:x=1", ["smoothness", "x=1", "none"]),
        ("total", ["total", "'value' is missing"]),
        ("length", ["length", "'target' is missing"]),
        ("bounds:low=3,high=1", ["bounds", "low=3.0", "high=1.0", "low < high"]),
        ("bounds:hard=true,floor=-inf", ["bounds", "floor=-inf", "finite"]),
        ("spectral:distance=dtw", ["distance", "'dtw'", "log_l1, wasserstein, kl"]),
        ("spectral:gamma=-1", ["gamma", "-1.0", ">= 0"]),
        ("spectral:segment=2", ["segment", "2", ">= 4"]),
        ("length:target=0", ["length", "target=0", "> 0"]),
        ("length:target=5+nonneg", ["mixes text and forecast"]),
        ("crps", ["CRPS", "true future", "no reward may see", "metric"]),
        ("nonneg+0.5*crps:x=1", ["CRPS", "true future"]),
        ("nonneg-spectral", ["nonneg-spectral", "allowed"]),
        ("", ["term ''", "allowed"]),
        ("regex:(", ["regex", "'('", "not a valid pattern"]),
        ("nowhere/mine.py:f", ["nowhere/mine.py", "does not exist"]),
    ],
)
def test_a_wrong_spec_names_the_term_what_is_wrong_and_what_is_allowed(spec, words):
    with pytest.raises(ConfigurationError) as error:
        parse_reward(spec)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_forecast_term_needs_a_history():
    with pytest.raises(ConfigurationError, match=r"nonneg.*no history"):
        parse_reward("nonneg").build(RewardContext(prompt="text"))


@pytest.mark.parametrize(("context", "samples"), [(HISTORY, decoded(SERIES)), (None, texts("", "a", "abc"))])
def test_a_users_function_sees_what_the_model_makes(tmp_path, context, samples):
    file = tmp_path / "mine.py"
    file.write_text("def size(batch):\n    return [len(sample) for sample in batch]\n\nsize_s = 3\n")
    factory = parse_reward(f"{file}:size")
    assert factory.view == "any"
    have = factory.build(RewardContext(history=context)).score(samples)
    assert have.tolist() == [len(s.tokens) if context is None else len(s.series) for s in samples]
    for missing in ("length", "size_s"):
        with pytest.raises(ConfigurationError, match=f"no function '{missing}'"):
            parse_reward(f"{file}:{missing}")


@pytest.mark.parametrize(
    ("spec", "view", "scores"),
    [
        (r"regex:\+\d+$", "text", [1, 0, 0]),
        ("answer:  Yes ", "text", [0, 1, 0]),
        ("length:target=4", "tokens", [-0.25, -0.25, -1]),
        ("2*length:target=5+length:target=10", "tokens", [-1.5, -0.5, -3]),
    ],
)
def test_text_rewards_are_exact(spec, view, scores):
    factory = parse_reward(spec)
    assert factory.view == view
    assert factory.build(RewardContext(prompt="p")).score(texts("1+2", " yES\n", "")) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("reward", "view"), [(Regex("a"), "text"), (Answer("a"), "text"), (Bounds(HISTORY, 0.0), "series")]
)
def test_a_reward_refuses_samples_without_its_view(reward, view):
    with pytest.raises(RewardError, match=f"needs the {view}"):
        reward.score([Decoded((1, 2))])
