"""What the flow network is told of tokens with numeric values: the Welch spectrum as it comes about, and the context's.

Spectral rewards compare the power spectrum of the generated values with that of the context (Welch 1967; Hann window,
constant detrending, segments overlapping by half, as in `metrics.spectrum`). Its coefficients are linear in the values,
so each generated value adds its own contribution: coefficient X[j, k] of segment j at frequency k is the sum over t of
value_t * basis[t, j, k], and the spectrum at k is the sum over j of |X[j, k]|^2.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

FLOOR_SHARE = 1e-3  # spectra are floored at this share of their mean, as in `metrics.spectrum`
TILT_FEATURES = 2  # what a network is told of lambda
_LEAST_POWER = 1e-6


def num_frequencies(segment: int) -> int:
    """Frequencies of the spectrum of one segment, 0 included."""
    return segment // 2 + 1


def num_segments(length: int, segment: int) -> int:
    """Segments, overlapping by half, in a series of `length` values."""
    return (length - segment) // _hop(segment) + 1


@lru_cache(maxsize=16)
def welch_basis(length: int, segment: int) -> np.ndarray:
    """basis [T, S, F] complex of a series of T = `length` values: the contributions of a value of 1 at each time.

    The sum over segments of |X|^2 is the power spectral density of `metrics.spectrum.power_spectrum`, 1 <= segment <= T.
    """
    # 1. A windowed segment's transform, detrended (which is linear too).
    window = _hann(segment)
    times = np.arange(segment)[:, None]
    frequency = np.arange(num_frequencies(segment))
    waves = np.exp(-2j * np.pi * times * frequency / segment)
    rows = window[:, None] * waves
    rows = rows - rows.sum(axis=0) / segment
    # 2. One-sided density: all frequencies but the ends stand for their negatives too.
    is_end = (frequency == 0) | (2 * frequency == segment)
    sided = np.where(is_end, 1.0, 2.0)
    count = num_segments(length, segment)
    window_power = max((window**2).sum(), 1e-12)
    rows = rows * np.sqrt(sided / (2 * window_power * count))
    # 3. Every segment has the same rows at its own times.
    basis = np.zeros((length, count, len(frequency)), dtype=np.complex128)
    for j in range(count):
        begin = j * _hop(segment)
        basis[begin : begin + segment, j] = rows
    return basis


def _hann(segment: int) -> np.ndarray:
    """The periodic Hann window [segment]."""
    if segment == 1:
        return np.ones(1)
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(segment) / segment)


def reference_power(
    values: torch.Tensor, lengths: torch.Tensor, basis: torch.Tensor
) -> torch.Tensor:
    """Mean spectrum [B, F], floored, of pieces as long as a sample of series [B, L] whose first `lengths` [B] are real.

    As `metrics.spectrum.reference_spectrum`: pieces of T values, evenly spaced from the first to the last value. A series
    shorter than one piece is taken as if zeros came before it. basis [T, S, F, 2]: real and imaginary parts.
    """
    size = basis.shape[0]
    padded = torch.nn.functional.pad(values, (size, 0))  # so that every series has one piece
    found = []
    for row, length in zip(padded, lengths.tolist(), strict=True):
        pieces = torch.stack([row[start : start + size] for start in _starts(length, size)])
        coefficients = torch.einsum("pt,tsfc->psfc", pieces, basis)
        found.append((coefficients**2).sum((1, 3)).mean(0))
    power = torch.stack(found)
    floor = FLOOR_SHARE * power.mean(-1, keepdim=True)
    return power.clamp(min=_LEAST_POWER) + floor


def _starts(length: int, size: int) -> list[int]:
    """Where pieces of `size` values begin in a series of `length` values with `size` zeros before it."""
    spanned = max(length, size)
    count = -(-spanned // size)
    first = size + length - spanned
    return np.linspace(first, length, count).round().astype(int).tolist()


def moments(log_weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation [..., 2] of values [..., K] under weights exp(log_weight) [..., K], -inf where none."""
    weight = torch.softmax(log_weight, dim=-1)
    mean = (weight * values).sum(-1, keepdim=True)
    spread = (weight * (values - mean) ** 2).sum(-1, keepdim=True).sqrt()
    return torch.cat([mean, spread], dim=-1)


def _hop(segment: int) -> int:
    return segment - segment // 2
