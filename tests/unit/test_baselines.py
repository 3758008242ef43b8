"""Classical forecasts: exact answers on periodic series, residuals at the right step, seeds, and refusals."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import ConfigurationError, ContextError, MissingExtraError
from sdt_dist.evaluation.baselines import (
    seasonal_naive,
    seasonal_naive_residuals,
    statsforecast_samples,
)
from sdt_dist.metrics.forecast import coverage_80, crps

# the horizon ends inside its third season
SEASON = 6
HORIZON = 15


def problem_of(
    values: np.ndarray, *, horizon: int = HORIZON, season: int = SEASON, index: int = 0
) -> ForecastProblem:
    history = values[:-horizon]
    truth = values[-horizon:]
    return ForecastProblem(
        index, "series", history, truth, season, float(history.mean()), float(history.std())
    )


def periodic(length: int, season: int = SEASON) -> np.ndarray:
    return np.resize(np.random.default_rng(5).normal(size=season), length)


def test_a_periodic_series_is_forecast_exactly_and_has_no_spread():
    problem = problem_of(periodic(64))
    np.testing.assert_array_equal(seasonal_naive(problem), problem.truth[None])
    samples = seasonal_naive_residuals(problem, num_samples=7, seed=3)
    np.testing.assert_array_equal(samples, np.repeat(problem.truth[None], 7, axis=0))
    assert crps(samples, problem.truth) == 0.0
    assert coverage_80(samples, problem.truth) == 1.0


def test_seasonal_naive_repeats_the_last_season_for_any_horizon():
    problem = problem_of(np.arange(40.0))
    last = problem.history[-SEASON:]
    np.testing.assert_array_equal(seasonal_naive(problem, 4)[0], last[:4])
    np.testing.assert_array_equal(
        seasonal_naive(problem, 14)[0], np.concatenate([last, last, last[:2]])
    )


def test_residuals_of_a_linear_series_are_its_drift_over_m_seasons():
    """x_t = t: every residual of season m is m * season, so the samples are the exact continuation."""
    problem = problem_of(np.arange(64.0))
    np.testing.assert_array_equal(
        seasonal_naive_residuals(problem, num_samples=5), np.repeat(problem.truth[None], 5, axis=0)
    )


def test_a_step_draws_every_residual_of_its_own_season_and_no_other():
    problem = problem_of(np.random.default_rng(1).normal(size=40))
    offsets = seasonal_naive_residuals(problem, num_samples=4000, seed=2) - seasonal_naive(problem)
    for step in range(HORIZON):
        lag = SEASON * (step // SEASON + 1)
        residuals = problem.history[lag:] - problem.history[:-lag]
        np.testing.assert_allclose(
            np.unique(offsets[:, step].round(9)), np.unique(residuals.round(9)), atol=1e-8
        )


def test_samples_centre_on_the_point_forecast_when_residuals_are_balanced():
    """A series that reads the same backwards has residuals that cancel, so only the draws' own error is left."""
    noise = np.random.default_rng(2).normal(size=200)
    history = np.concatenate([noise, noise[::-1]])
    problem = problem_of(np.concatenate([history, np.zeros(HORIZON)]))
    offsets = seasonal_naive_residuals(problem, num_samples=4000, seed=0) - seasonal_naive(problem)
    errors = offsets.std(axis=0) / np.sqrt(len(offsets))
    assert np.all(np.abs(offsets.mean(axis=0)) < 4 * errors)
    # sqrt(2) for white noise
    assert np.all((offsets.std(axis=0) > 1.2) & (offsets.std(axis=0) < 1.65))


@pytest.mark.parametrize("draw", [seasonal_naive_residuals, statsforecast_samples])
def test_a_seed_repeats_and_problems_have_streams_of_their_own(draw):
    values = periodic(100) + 0.1 * np.random.default_rng(0).normal(size=100)
    first, again, other_seed = (
        draw(problem_of(values), num_samples=9, seed=seed) for seed in (4, 4, 5)
    )
    other_problem = draw(problem_of(values, index=1), num_samples=9, seed=4)
    assert first.shape == (9, HORIZON)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other_seed)
    assert not np.array_equal(first, other_problem)


def test_autoets_follows_a_clean_season_with_the_spread_of_its_noise():
    """sin + noise of 0.1: a forecaster that knew the sine would have an error of 0.1 at every step."""
    time = np.arange(264)
    clean = 10 + 3 * np.sin(2 * np.pi * time / 12)
    problem = problem_of(
        clean + 0.1 * np.random.default_rng(0).normal(size=264), horizon=24, season=12
    )
    samples = statsforecast_samples(problem, num_samples=400)
    assert np.abs(samples.mean(axis=0) - clean[-24:]).max() < 0.15
    assert 0.07 < samples.std(axis=0).mean() < 0.15
    assert crps(samples, problem.truth) < 0.5 * crps(seasonal_naive(problem), problem.truth)


def test_autoarima_continues_a_random_walk_with_growing_spread():
    """ARIMA(0,1,0) with unit steps: a spread of sqrt(h) around the last value."""
    walk = np.cumsum(np.random.default_rng(3).normal(size=216))
    problem = problem_of(walk, horizon=16, season=1)
    samples = statsforecast_samples(problem, "AutoARIMA", num_samples=4000)
    assert np.abs(samples.mean(axis=0) - problem.history[-1]).max() < 1.0
    np.testing.assert_allclose(samples.std(axis=0), np.sqrt(np.arange(1, 17)), rtol=0.2)


def test_refusals_name_what_is_allowed(monkeypatch: pytest.MonkeyPatch):
    problem = problem_of(np.random.default_rng(0).normal(size=32))
    with pytest.raises(ContextError, match=r"17 values, allowed: at least 19"):
        seasonal_naive_residuals(problem)
    with pytest.raises(ContextError, match=r"17 values, allowed: at least 20"):
        seasonal_naive(problem_of(np.arange(32.0), season=20))
    with pytest.raises(ConfigurationError, match="horizon: 0"):
        seasonal_naive(problem, 0)
    with pytest.raises(ConfigurationError, match="num_samples: 0"):
        seasonal_naive_residuals(problem, num_samples=0)
    with pytest.raises(ConfigurationError, match="AutoETS"):
        statsforecast_samples(problem, "autoets")
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sdt-dist\[baselines\]'"):
        statsforecast_samples(problem)


def test_a_history_that_cannot_be_fitted_is_refused():
    with pytest.raises(ContextError, match="constant"):
        statsforecast_samples(problem_of(np.ones(60)))
