"""Power spectra by Welch's method and distances between them: the one place for rewards and metrics (SPEC 2 and 8).

Frequency is normalised to [0, 1] (1 is the Nyquist frequency). Spectra of a sample and of its context use the same
window (Hann), detrending (constant), segment length and overlap (half).
"""

from __future__ import annotations

import numpy as np
from scipy.integrate import trapezoid
from scipy.signal import welch
from scipy.stats import wasserstein_distance

from sdt_dist.errors import ContextError

FLOOR_SHARE = 1e-3  # spectra are floored at this share of the mean reference power, so empty bins do not dominate
MAX_W1 = 1.0


def power_spectrum(series: np.ndarray, segment: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies [F] in [0, 1] and power spectral densities [..., F] of series [..., L], L >= segment."""
    if segment < 4 or series.shape[-1] < segment:
        raise ContextError(f"segment: {segment}, allowed: 4 up to the series' length of {series.shape[-1]}.")
    return welch(series, fs=2.0, nperseg=segment, noverlap=segment // 2, window="hann", detrend="constant")


def reference_spectrum(history: np.ndarray, length: int, segment: int) -> np.ndarray:
    """E[S_c] [F]: the mean spectrum of segments of a history [L] that are as long as a sample.

    Segments are evenly spaced from the first to the last value and cover all of it, overlapping where L is no
    multiple of `length`. ContextError when the history is shorter than one sample.
    """
    if len(history) < length:
        raise ContextError(f"history: {len(history)} values, allowed: at least the horizon of {length} for a spectrum.")
    count = -(-len(history) // length)
    starts = np.linspace(0, len(history) - length, count).round().astype(int)
    pieces = np.stack([history[start : start + length] for start in starts])
    return power_spectrum(pieces, segment)[1].mean(axis=0)


def log_l1(spectrum: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Integral over normalised frequency of |log S - log S_ref| [...], in nats, both floored."""
    floor = FLOOR_SHARE * reference.mean()
    gap = np.abs(np.log(np.maximum(spectrum, floor)) - np.log(np.maximum(reference, floor)))
    return trapezoid(gap, np.linspace(0, 1, gap.shape[-1]), axis=-1)


def spectral_w1(spectrum: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """W1 distance [...] of normalised spectra over frequency in [0, 1]; 1 where a spectrum has no power.

    Wasserstein–Fourier distance with p = 1 (Cazelles et al. 2021, arXiv 1912.05509, definition 3).
    """
    grid = np.linspace(0, 1, reference.shape[-1])
    rows = spectrum.reshape(-1, spectrum.shape[-1])
    found = [
        wasserstein_distance(grid, grid, row, reference) if row.sum() > 1e-20 and reference.sum() > 1e-20 else MAX_W1
        for row in rows
    ]
    return np.array(found).reshape(spectrum.shape[:-1])


def spectral_kl(spectrum: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """KL divergence [...] of the normalised spectrum from the normalised reference, both floored, in nats."""
    floor = FLOOR_SHARE * reference.mean()
    p, q = np.maximum(spectrum, floor), np.maximum(reference, floor)
    p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum()
    return (p * np.log(p / q)).sum(axis=-1)


DISTANCES = {"log_l1": log_l1, "wasserstein": spectral_w1, "kl": spectral_kl}
