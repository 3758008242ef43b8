"""Classical forecasts as samples [S, H], the yardsticks that a forecaster is measured against.

See docs/guides/evaluate.md.

They see a problem's history and its season, never its truth, and know nothing of models, rewards or search. Steps of
a sample are drawn independently: samples have the right spread at every step, but are no paths (use them for CRPS,
WQL, MASE and coverage, not for spectra). A problem's stream is (seed, problem index).
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.data.scale import fit_scale
from sdt_dist.errors import ConfigurationError, ContextError, unknown_name
from sdt_dist.extras import packages_of

STATSFORECAST_MODELS = ("AutoARIMA", "AutoETS")
_LEVEL = 80  # percent of the interval from which a Gaussian's standard deviation is read


def seasonal_naive(problem: ForecastProblem, horizon: int | None = None) -> np.ndarray:
    """The last season of the history, repeated: a point forecast [1, H] in the user's units.

    horizon: H, default the truth's length. ContextError when the history is shorter than one season.
    Hyndman and Athanasopoulos, Forecasting: Principles and Practice, 3rd edition, section 5.2.
    """
    steps = _steps(problem, horizon)
    _require(problem, problem.season)
    return np.resize(problem.history[-problem.season :], (1, steps))


def seasonal_naive_residuals(
    problem: ForecastProblem, num_samples: int = 100, seed: int = 0, *, horizon: int | None = None
) -> np.ndarray:
    """Seasonal-naive plus its own in-sample residuals at the same step: samples [S, H] in the user's units.

    Step h lies in season m = ceil(h / season) after the history, so it adds a residual x_t - x_{t - m season}, drawn
    uniformly from all such t in the history. ContextError when the history has no residual for the last step.
    Bootstrapped residuals of Forecasting: Principles and Practice, 3rd edition, section 5.5, without its
    random-walk formula sigma sqrt(m): residuals m seasons apart are taken as they are.
    """
    _check_samples(num_samples)
    samples = np.repeat(seasonal_naive(problem, horizon), num_samples, axis=0)
    steps = samples.shape[1]
    season = problem.season
    _require(problem, -(-steps // season) * season + 1)
    rng = _stream(problem, seed)
    for start in range(0, steps, season):
        lag = start + season
        residuals = problem.history[lag:] - problem.history[:-lag]
        samples[:, start:lag] += rng.choice(residuals, size=samples[:, start:lag].shape)
    return samples


def statsforecast_samples(
    problem: ForecastProblem,
    model: str = "AutoETS",
    num_samples: int = 100,
    seed: int = 0,
    *,
    horizon: int | None = None,
) -> np.ndarray:
    """Gaussian samples [S, H] in the user's units, of the mean and 80% interval that a statsforecast model predicts.

    model: "AutoETS" (about a second for 512 values of season 24) or "AutoARIMA" (half a minute). Both choose their
    form by AICc, and AutoETS may choose one without a season. Raises MissingExtraError without statsforecast,
    ConfigurationError for another model, ContextError for a history that cannot be fitted.
    Hyndman and Khandakar 2008 (doi 10.18637/jss.v027.i03), in the implementation of statsforecast.
    """
    _check_samples(num_samples)
    steps = _steps(problem, horizon)
    mean, std = _predict(problem, model, steps)
    return _stream(problem, seed).normal(mean, std, size=(num_samples, steps))


def _predict(problem: ForecastProblem, model: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Means [H] and standard deviations [H]; statsforecast's intervals are mean +- z sigma."""
    if model not in STATSFORECAST_MODELS:
        raise unknown_name("classical model", model, STATSFORECAST_MODELS)
    with packages_of("baselines", model):
        from statsforecast import models
    fit_scale(problem.history)  # refuses what is too short, not finite or constant
    found = getattr(models, model)(season_length=problem.season).forecast(
        y=np.asarray(problem.history, dtype=np.float64), h=steps, level=[_LEVEL]
    )
    low, high = (np.asarray(found[f"{side}-{_LEVEL}"], dtype=np.float64) for side in ("lo", "hi"))
    std = (high - low) / (2 * norm.ppf(0.5 + _LEVEL / 200))
    if not (np.isfinite(found["mean"]).all() and np.isfinite(std).all()):
        raise ContextError(
            f"history of {problem.name!r}: {model} predicts values that are not finite; leave it out."
        )
    return np.asarray(found["mean"], dtype=np.float64), std


def _stream(problem: ForecastProblem, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, problem.index])


def _steps(problem: ForecastProblem, horizon: int | None) -> int:
    steps = len(problem.truth) if horizon is None else horizon
    if steps < 1:
        raise ConfigurationError(f"horizon: {steps}, allowed: at least 1.")
    return steps


def _check_samples(num_samples: int) -> None:
    if num_samples < 1:
        raise ConfigurationError(f"num_samples: {num_samples}, allowed: at least 1.")


def _require(problem: ForecastProblem, length: int) -> None:
    if len(problem.history) < length:
        raise ContextError(
            f"history of {problem.name!r}: {len(problem.history)} values, allowed: at least {length} for season "
            f"{problem.season}; shorten the horizon or give more history."
        )
