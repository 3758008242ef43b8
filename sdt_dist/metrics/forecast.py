"""Measures of a forecast given as samples [S, H], against the truth [H] and the history [L].

See docs/guides/evaluate.md.
"""

from __future__ import annotations

import numpy as np
import scoringrules

from sdt_dist.metrics.dtw import dtw_distances
from sdt_dist.metrics.spectrum import (
    MIN_SEGMENT,
    log_l1,
    power_spectrum,
    reference_spectrum,
    spectral_w1,
)

QUANTILES = np.arange(1, 10) / 10


def crps(samples: np.ndarray, truth: np.ndarray) -> float:
    """Mean CRPS over the horizon, fair estimator; a single sample scores its absolute error.

    Fair: unbiased in the number of samples (Ferro 2014, section 2).
    """
    if len(samples) == 1:
        return float(np.abs(samples[0] - truth).mean())
    return float(
        np.mean(np.asarray(scoringrules.crps_ensemble(truth, samples.T, estimator="fair")))
    )


def quantile_loss(samples: np.ndarray, truth: np.ndarray) -> float:
    """Sum over the horizon of the mean pinball loss x 2 at q = .1 to .9; WQL is its sum over sum |truth|.

    Chronos (arXiv 2403.07815), section 5.3.
    """
    forecast = np.quantile(samples, QUANTILES, axis=0)
    losses = scoringrules.quantile_score(truth[None], forecast, QUANTILES[:, None])
    return float(2 * np.mean(losses, axis=0).sum())


def seasonal_scale(history: np.ndarray, season: int) -> float:
    """In-sample mean absolute error of the seasonal-naive forecast on the history (the MASE denominator)."""
    lag = season if len(history) > season else 1
    return float(np.abs(history[lag:] - history[:-lag]).mean())


def mase(samples: np.ndarray, truth: np.ndarray, history: np.ndarray, season: int) -> float:
    """Mean absolute error of the median over `seasonal_scale` (Hyndman and Koehler 2006)."""
    return float(
        np.abs(np.median(samples, axis=0) - truth).mean()
        / max(seasonal_scale(history, season), 1e-12)
    )


def coverage_80(samples: np.ndarray, truth: np.ndarray) -> float:
    """Share of the horizon inside the central 80% interval of the samples."""
    low, high = np.quantile(samples, [0.1, 0.9], axis=0)
    return float(((truth >= low) & (truth <= high)).mean())


def dtw(samples: np.ndarray, truth: np.ndarray) -> float:
    """Mean DTW distance of samples to the truth, over the square root of the horizon."""
    return float(dtw_distances(samples, truth).mean() / np.sqrt(len(truth)))


def spectral_measures(series: np.ndarray, history: np.ndarray) -> dict[str, float]:
    """spec_w1 (segment L), spec_w1_half (L/2) and log_l1 (L/2), means over series [S, H] against the history.

    Empty for a horizon below 4, where there is no spectrum to speak of.
    """
    length = series.shape[1]
    if length < MIN_SEGMENT:
        return {}
    half = max(MIN_SEGMENT, length // 2)
    whole_reference, half_reference = (
        reference_spectrum(history, length, segment) for segment in (length, half)
    )
    (whole_axis, whole), (half_axis, halved) = (
        power_spectrum(series, segment) for segment in (length, half)
    )
    return {
        "spec_w1": float(spectral_w1(whole, whole_reference, whole_axis).mean()),
        "spec_w1_half": float(spectral_w1(halved, half_reference, half_axis).mean()),
        "log_l1": float(log_l1(halved, half_reference, half_axis).mean()),
    }


def forecast_measures(
    samples: np.ndarray,
    truth: np.ndarray,
    history: np.ndarray,
    season: int,
    loc: float,
    scale: float,
) -> dict[str, float]:
    """All forecast measures of one problem; series are z-scored by (loc, scale) first.

    Includes the numerator and denominator of WQL, which is a ratio of sums over problems in the user's units.
    """
    z_samples, z_truth, z_history = ((x - loc) / scale for x in (samples, truth, history))
    measures = {
        "crps": crps(z_samples, z_truth),
        "wql_loss": quantile_loss(samples, truth),
        "wql_scale": float(np.abs(truth).sum()),
        "mase": mase(samples, truth, history, season),
        "coverage_80": coverage_80(samples, truth),
        "dtw": dtw(z_samples, z_truth),
    }
    return measures | spectral_measures(z_samples, z_history)
