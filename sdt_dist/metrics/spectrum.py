"""Power spectra by Welch's method and distances between them: the one place for rewards and metrics.

See docs/guides/rewards.md, docs/guides/evaluate.md.

Frequency is normalised to [0, 1] (1 is the Nyquist frequency); a segment of n values, n odd, reaches (n - 1)/n, so
distances take the axis that `power_spectrum` returns. Spectra of a sample and of its context use the same
window (Hann), detrending (constant), segment length and overlap (half).
"""

from __future__ import annotations

import numpy as np
from scipy.integrate import trapezoid
from scipy.signal import welch
from scipy.stats import wasserstein_distance

from sdt_dist.errors import ContextError

FLOOR_SHARE = 1e-3  # spectra are floored at this share of the mean reference power, so empty bins do not dominate
MIN_SEGMENT = 4
MAX_W1 = 1.0
_NO_POWER = 1e-20  # a spectrum with less power is that of a constant, up to rounding


def power_spectrum(series: np.ndarray, segment: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies [F] in [0, 1] and power spectral densities [..., F] of series [..., L], L >= segment."""
    if segment < MIN_SEGMENT or series.shape[-1] < segment:
        raise ContextError(
            f"segment: {segment}, allowed: {MIN_SEGMENT} up to the series' length of {series.shape[-1]}."
        )
    return welch(
        series, fs=2.0, nperseg=segment, noverlap=segment // 2, window="hann", detrend="constant"
    )


def reference_spectrum(history: np.ndarray, length: int, segment: int) -> np.ndarray:
    """E[S_c] [F]: the mean spectrum of segments of a history [L] that are as long as a sample.

    Segments are evenly spaced from the first to the last value and cover all of it, overlapping where L is no
    multiple of `length`. ContextError when the history is shorter than one sample.
    """
    if len(history) < length:
        raise ContextError(
            f"history: {len(history)} values, allowed: at least the horizon of {length} for a spectrum."
        )
    count = -(-len(history) // length)
    starts = np.linspace(0, len(history) - length, count).round().astype(int)
    pieces = np.stack([history[start : start + length] for start in starts])
    return power_spectrum(pieces, segment)[1].mean(axis=0)


def log_l1(
    spectrum: np.ndarray, reference: np.ndarray, frequencies: np.ndarray | None = None
) -> np.ndarray:
    """Integral over normalised frequency of |log S - log S_ref| [...], in nats, both floored.

    frequencies [F], here and below: the axis from `power_spectrum`; default that of an even segment.
    """
    floor = _floor(reference)
    gap = np.abs(np.log(np.maximum(spectrum, floor)) - np.log(np.maximum(reference, floor)))
    return trapezoid(gap, _axis(reference, frequencies), axis=-1)


def spectral_w1(
    spectrum: np.ndarray, reference: np.ndarray, frequencies: np.ndarray | None = None
) -> np.ndarray:
    """W1 distance [...] of normalised spectra over frequency in [0, 1]; 1 where a spectrum has no power.

    Wasserstein–Fourier distance with p = 1 (Cazelles et al. 2021, arXiv 1912.05509, definition 3).
    """
    axis = _axis(reference, frequencies)
    rows = spectrum.reshape(-1, spectrum.shape[-1])
    found = [
        wasserstein_distance(axis, axis, row, reference)
        if min(row.sum(), reference.sum()) > _NO_POWER
        else MAX_W1
        for row in rows
    ]
    return np.array(found).reshape(spectrum.shape[:-1])


def spectral_kl(
    spectrum: np.ndarray, reference: np.ndarray, frequencies: np.ndarray | None = None
) -> np.ndarray:
    """KL divergence [...] of the normalised spectrum from the normalised reference, both floored, in nats.

    Bins are equally wide, so the axis does not matter.
    """
    floor = _floor(reference)
    p = np.maximum(spectrum, floor)
    q = np.maximum(reference, floor)
    p = p / p.sum(axis=-1, keepdims=True)
    q = q / q.sum()
    return (p * np.log(p / q)).sum(axis=-1)


def _floor(reference: np.ndarray) -> float:
    """The floor of both spectra; that of a reference without power is tiny instead of 0, so that logs stay finite."""
    return FLOOR_SHARE * max(float(reference.mean()), _NO_POWER)


def _axis(reference: np.ndarray, frequencies: np.ndarray | None) -> np.ndarray:
    return np.linspace(0, 1, reference.shape[-1]) if frequencies is None else frequencies


DISTANCES = {"log_l1": log_l1, "wasserstein": spectral_w1, "kl": spectral_kl}
