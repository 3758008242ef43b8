"""Exact answers and laws of the measures: forecasts, spectra, texts, and their bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
import scoringrules
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import wasserstein_distance

from sdt_dist.metrics.aggregate import paired_difference, ratio_of_means, ratio_of_sums, summarise
from sdt_dist.metrics.dtw import dtw_distances
from sdt_dist.metrics.forecast import (
    coverage_80,
    crps,
    dtw,
    forecast_measures,
    mase,
    quantile_loss,
    seasonal_scale,
    spectral_measures,
)
from sdt_dist.metrics.spectrum import (
    DISTANCES,
    log_l1,
    power_spectrum,
    reference_spectrum,
    spectral_kl,
    spectral_w1,
)
from sdt_dist.metrics.text import classification, distinct_n, generation, perplexity

QUIET = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SPECTRA = hnp.arrays(np.float64, (4, 17), elements=st.floats(0, 1e6))
SAMPLE_SETS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 6), st.integers(8, 40)),
    elements=st.floats(-1e3, 1e3, width=32),
)


@pytest.mark.parametrize("num_samples", [2, 3, 10, 40])
@pytest.mark.parametrize("observed", [-2.0, 0.0, 0.7])
def test_crps_is_unbiased_for_every_number_of_samples(observed, num_samples):
    rng = np.random.default_rng(num_samples)
    truth = np.full(50, observed)
    batches = [crps(rng.standard_normal((num_samples, 50)), truth) for _ in range(200)]
    error = np.mean(batches) - scoringrules.crps_normal(observed, 0.0, 1.0)
    assert abs(error) < 4 * np.std(batches, ddof=1) / np.sqrt(200)


def test_crps_of_one_sample_is_its_absolute_error():
    assert crps(np.array([[1.0, -2.0, 3.0]]), np.array([0.0, 2.0, 3.0])) == 5 / 3


def test_crps_of_equal_samples_is_their_absolute_error():
    assert crps(np.full((5, 2), 3.0), np.array([1.0, 3.0])) == pytest.approx(1.0, abs=1e-12)


def test_mase_of_the_seasonal_naive_forecast_by_hand():
    history = np.array([1.0, 2.0, 4.0, 2.0, 4.0, 7.0])
    truth = np.array([4.0, 4.0, 9.0])
    assert seasonal_scale(history, 3) == (1 + 2 + 3) / 3
    assert mase(history[None, -3:], truth, history, 3) == pytest.approx((2 + 0 + 2) / 3 / 2)


@pytest.mark.parametrize("season", [1, 4, 7])
def test_the_seasonal_naive_forecast_of_a_trend_has_mase_one(season):
    series = 3.0 * np.arange(40 + season) + np.resize(
        np.random.default_rng(0).standard_normal(season), 40 + season
    )
    history = series[:40]
    truth = series[40:]
    assert mase(history[None, -season:], truth, history, season) == pytest.approx(1.0)


def test_mase_scores_the_median_and_falls_back_to_lag_one():
    history = np.array([0.0, 1.0, 3.0])
    assert seasonal_scale(history, 3) == 1.5
    assert mase(np.array([[0.0], [1.0], [1000.0]]), np.array([4.0]), history, 3) == pytest.approx(
        3 / 1.5
    )


def test_coverage_of_exact_quantiles_is_exact():
    samples = np.repeat(np.linspace(0, 1, 101)[:, None], 10, axis=1)
    truth = (np.arange(10) + 0.5) / 10
    assert coverage_80(samples, truth) == 0.8
    assert coverage_80(samples, truth / 10) == 0.0
    assert coverage_80(np.random.default_rng(0).permutation(samples), 0.1 + 0.8 * truth) == 1.0


def test_wql_by_hand():
    """Quantiles 1..9 of {0, 10} against 4: twice the pinball losses is 2 * (1.0 + 3.5), a ninth of it a level."""
    samples = np.array([[0.0, 0.0], [10.0, 10.0]])
    truth = np.array([4.0, 4.0])
    assert quantile_loss(samples, truth) == pytest.approx(2.0)
    wql = ratio_of_sums(np.array([quantile_loss(samples, truth)]), np.array([np.abs(truth).sum()]))
    assert wql == pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})


def test_quantile_loss_of_a_certain_forecast_is_its_absolute_error():
    assert quantile_loss(np.full((4, 3), 2.0), np.array([2.0, 5.0, -1.0])) == pytest.approx(6.0)


def test_dtw_forgives_shifts_and_nothing_else():
    truth = np.array([0.0, 0.0, 1.0, 0.0, 0.0])
    assert dtw(np.stack([truth, np.roll(truth, 1)]), truth) == 0.0
    assert dtw(truth[None] + 2.0, np.zeros(5)) == pytest.approx(np.sqrt((4 * 4 + 9) / 5))


def test_dtw_distances_by_hand():
    """[1, 2, 3] to [2, 2, 2, 3, 4] pairs 1-2, 2-2, 2-2, 3-3, 3-4; [5, 5, 5] pays 3 * 9 + 4 + 1."""
    template = np.array([2.0, 2.0, 2.0, 3.0, 4.0])
    rows = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [2.0, 3.0, 4.0]])
    np.testing.assert_allclose(dtw_distances(rows, template), np.sqrt([2.0, 32.0, 0.0]), rtol=1e-15)
    assert dtw_distances(
        np.arange(6.0).reshape(1, 6)[:, ::2], np.array([0.0, 2.0, 4.0])
    ).tolist() == [0.0]


@pytest.mark.parametrize(("slope", "offset"), [(2.0, 0.0), (0.5, -40.0), (100.0, 7.0)])
def test_measures_do_not_depend_on_units(slope, offset):
    rng = np.random.default_rng(3)
    samples, truth, history = (rng.standard_normal(size).cumsum(-1) for size in ((6, 24), 24, 96))
    here = forecast_measures(samples, truth, history, 12, 1.5, 2.5)
    moved = [slope * x + offset for x in (samples, truth, history)]
    there = forecast_measures(*moved, 12, slope * 1.5 + offset, slope * 2.5)
    assert there["wql_loss"] == pytest.approx(slope * here["wql_loss"])
    same = set(here) - {"wql_loss", "wql_scale"}
    assert same == {"crps", "mase", "coverage_80", "dtw", "spec_w1", "spec_w1_half", "log_l1"}
    assert {name: there[name] for name in same} == pytest.approx(
        {name: here[name] for name in same}
    )


@pytest.mark.parametrize(("first", "second"), [(0.2, 0.6), (0.8, 0.35), (0.5, 0.55)])
def test_spec_w1_of_two_tones_is_their_distance(first, second):
    steps = np.pi * np.arange(960)
    measures = spectral_measures(np.sin(second * steps[:240] + 0.3)[None], np.sin(first * steps))
    assert measures["spec_w1"] == pytest.approx(abs(first - second), abs=1 / 120)
    assert measures["spec_w1_half"] == pytest.approx(abs(first - second), abs=1 / 60)
    assert (
        spectral_measures(np.sin(first * steps[:240])[None], np.sin(first * steps))["spec_w1"]
        < 1 / 120
    )


@pytest.mark.parametrize("length", [5, 9, 14, 15, 24])
def test_distances_use_the_frequencies_of_their_spectra(length):
    series, history = (
        np.random.default_rng(length).standard_normal(size) for size in (length, 5 * length)
    )
    measures = spectral_measures(series[None], history)
    half = max(4, length // 2)
    for name, segment in (("spec_w1", length), ("spec_w1_half", half)):
        axis, power = power_spectrum(series, segment)
        want = wasserstein_distance(axis, axis, power, reference_spectrum(history, length, segment))
        assert measures[name] == pytest.approx(want, rel=1e-12)
    axis, power = power_spectrum(series, half)
    assert axis[-1] == (1.0 if half % 2 == 0 else (half - 1) / half)
    assert log_l1(10 * power, power, axis) == pytest.approx(np.log(10) * axis[-1])


def test_short_horizons_have_no_spectrum_and_flat_histories_have_finite_measures():
    flat = np.full(96, 3.0)
    rng = np.random.default_rng(0)
    for horizon in (1, 2, 3):
        measures = forecast_measures(
            rng.standard_normal((4, horizon)), np.ones(horizon), flat, 1, 3.0, 1.0
        )
        assert set(measures) == {"crps", "wql_loss", "wql_scale", "mase", "coverage_80", "dtw"}
    measures = spectral_measures(rng.standard_normal((4, 24)), flat - 3.0)
    assert measures["spec_w1"] == 1.0 and np.isfinite(list(measures.values())).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e3 / 3])
def test_a_constant_sample_scores_exactly_one(value):
    history = np.random.default_rng(0).standard_normal(96)
    measures = spectral_measures(np.full((3, 24), value), history)
    assert measures["spec_w1"] == measures["spec_w1_half"] == 1.0


@QUIET
@given(SAMPLE_SETS)
def test_the_spectrum_of_a_mean_is_below_the_mean_spectrum(samples):
    for segment in (4, samples.shape[1] // 2, samples.shape[1]):
        of_mean = power_spectrum(samples.mean(axis=0), segment)[1]
        mean_of = power_spectrum(samples, segment)[1].mean(axis=0)
        assert (of_mean <= mean_of * (1 + 1e-9) + 1e-18 * np.square(samples).max()).all()


def test_averaging_opposite_phases_leaves_no_power():
    wave = np.sin(np.arange(64) / 2)
    assert not power_spectrum(np.stack([wave, -wave]).mean(axis=0), 32)[1].any()
    assert power_spectrum(wave, 32)[1].sum() > 1


def test_the_power_of_white_noise_is_its_variance():
    noise = 3.0 * np.random.default_rng(0).standard_normal(200_000)
    frequencies, power = power_spectrum(noise, 64)
    assert (frequencies[0], frequencies[-1]) == (0.0, 1.0)
    assert power[2:-2].mean() == pytest.approx(9.0, rel=0.02)


def test_a_reference_covers_the_whole_history():
    history = np.zeros(50)
    quiet = reference_spectrum(history, 16, 8)
    for position in (1, 24, 48):
        history[position] = 1.0
        assert not quiet.any() and reference_spectrum(history, 16, 8).sum() > 0
        history[position] = 0.0


@QUIET
@given(SPECTRA, st.integers(0, 3))
def test_distances_are_zero_to_itself_and_never_negative(spectra, chosen):
    reference = spectra[chosen] + 1e-3
    for distance in DISTANCES.values():
        assert distance(np.stack([reference] * 3), reference).tolist() == [0.0] * 3
        assert (distance(spectra, reference) >= -1e-12).all()


@pytest.mark.parametrize("factor", [1.5, 10.0, 100.0])
def test_log_l1_of_a_scaled_spectrum_is_the_log_of_the_factor_both_ways(factor):
    spectrum = np.linspace(1.0, 3.0, 33)
    for scaled in (factor * spectrum, spectrum / factor):
        assert log_l1(scaled[None], spectrum) == pytest.approx([np.log(factor)])
    assert log_l1(0 * spectrum[None], np.ones(33)) == pytest.approx([np.log(1000)])


def test_normalised_distances_ignore_power():
    low = np.linspace(1.0, 3.0, 33)
    high = np.linspace(3.0, 1.0, 33)
    for distance in (spectral_w1, spectral_kl):
        assert distance(50 * low[None], low) == pytest.approx([0.0], abs=1e-12)
        assert distance(50 * low[None], high) == pytest.approx(distance(low[None], high)) != [0.0]


def test_kl_by_hand():
    assert spectral_kl(np.array([[1.0, 3.0]]), np.array([2.0, 2.0])) == pytest.approx(
        [np.log(0.5 * 1.5**3) / 4]
    )


@pytest.mark.parametrize("values", [[0.1] * 9, [5.0]])
def test_the_interval_of_a_constant_has_no_width(values):
    assert summarise(np.array(values)) == {"mean": values[0], "low": values[0], "high": values[0]}


def test_intervals_are_those_of_the_normal_approximation_and_repeat():
    values = np.random.default_rng(1).standard_normal(400)
    found = summarise(values)
    assert found["mean"] == values.mean()
    error = values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert summarise(values) == found


def test_ratios_resample_problems_not_terms():
    scale = np.random.default_rng(2).integers(1, 9, 30).astype(float)
    assert (
        ratio_of_sums(3 * scale, scale)
        == ratio_of_means(3 * scale, scale)
        == {"mean": 3, "low": 3, "high": 3}
    )
    uneven = ratio_of_sums(np.array([1.0, 9.0]), np.array([1.0, 3.0]))
    assert uneven == {"mean": 2.5, "low": 1.0, "high": 3.0}


def test_paired_differences_cancel_what_problems_share():
    hardness = np.random.default_rng(4).integers(0, 1000, 40).astype(float)
    gain = np.resize([1.0, 2.0], 40)
    assert paired_difference(hardness + 2.0, hardness) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert paired_difference(hardness, hardness)["high"] == 0.0
    found = paired_difference(hardness - gain, hardness)
    assert -2.0 < found["low"] < found["mean"] == -1.5 < found["high"] < -1.0


def test_distinct_n_by_hand():
    samples = [[1, 2, 1, 2], [1, 2]]
    assert [distinct_n(samples, n) for n in (1, 2, 3, 5)] == [2 / 6, 2 / 4, 1.0, 0.0]


@pytest.mark.parametrize("vocab_size", [2, 50_000])
def test_perplexity_of_uniform_tokens_is_the_vocabulary(vocab_size):
    lengths = [3, 1, 7]
    assert perplexity([-n * np.log(vocab_size) for n in lengths], lengths) == pytest.approx(
        vocab_size
    )


def test_perfect_and_hopeless_answers():
    labels = ["a", "b", "c", "a"]
    assert classification(labels, labels) == {"accuracy": 1.0, "macro_f1": 1.0, "kappa": 1.0}
    assert classification(["a", "a"], ["a", "b"]) == pytest.approx(
        {"accuracy": 0.5, "macro_f1": 1 / 3, "kappa": 0.0}
    )
    assert classification(["a", "a"], ["a", "a"]) == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "kappa": 1.0,
    }
    assert classification(["b", "b"], ["a", "a"]) == {
        "accuracy": 0.0,
        "macro_f1": 0.0,
        "kappa": 0.0,
    }
    assert generation(["yes", "blue"], ["yes", "blue"]) == pytest.approx(
        {"bleu": 100.0, "rouge_l": 1.0}
    )
    assert generation(["yes", "blue"], ["no", "red"]) == {"bleu": 0.0, "rouge_l": 0.0}
    lines = ["the cat sat on the mat", "a dog ran far away today"]
    assert generation(lines, lines) == pytest.approx({"bleu": 100.0, "rouge_l": 1.0})
    assert generation(["x"] * 2, lines) == {"bleu": 0.0, "rouge_l": 0.0}
