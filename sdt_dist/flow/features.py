"""What the flow network is told of tokens with numeric values: smooth functions of a value, and power spectra.

Spectral rewards depend on the spectrum of the generated values and on that of the context, so both are given
(Welch 1967; Hann window, constant detrending, segments overlapping by half, as in `metrics.spectrum`).
"""

from __future__ import annotations

import math

import torch

_NUM_BUMPS = 12
VALUE_FEATURES = 3 + _NUM_BUMPS
_TYPICAL_LIMIT = 3.0  # standardised values are mostly within 3 standard deviations
_FLOOR = 1e-3


def value_features(values: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    """Smooth features [..., VALUE_FEATURES] of values [...] that lie within `limits`: u, u^2, a constant and bumps.

    u is the value over its typical half range (at most 3); Gaussian bumps are evenly spaced over u in [-1, 1].
    """
    middle = (limits[0] + limits[1]) / 2
    u = (values - middle) / min(_TYPICAL_LIMIT, (limits[1] - limits[0]) / 2)
    centres = torch.linspace(-1, 1, _NUM_BUMPS, dtype=values.dtype, device=values.device)
    bumps = torch.exp(-0.5 * ((u[..., None] - centres) * (_NUM_BUMPS - 1) / 2) ** 2)
    return torch.cat([torch.stack([torch.ones_like(u), u, u * u], dim=-1), bumps], dim=-1)


def num_frequencies(segment: int) -> int:
    """Frequencies of the spectrum of one segment, 0 included."""
    return segment // 2 + 1


def log_power(values: torch.Tensor, is_real: torch.Tensor, size: int) -> torch.Tensor:
    """Log power spectrum [B, F] of series [B, L] whose real values are the last ones (`is_real` [B, L]), L >= size.

    The mean over segments that hold real values only, counted from the end; where there is none, the last segment with
    zeros for what is missing.
    """
    hop = max(1, size // 2)
    segments = values.flip(-1).unfold(-1, size, hop)  # [B, S, size]; reversed time has the same power
    whole = is_real.flip(-1).unfold(-1, size, hop).all(-1).to(values.dtype)
    whole = torch.where(whole.sum(-1, keepdim=True) > 0, whole, torch.eye(whole.shape[-1])[:1].to(whole))
    window = torch.hann_window(size, dtype=values.dtype, device=values.device)
    centred = (segments - segments.mean(-1, keepdim=True)) * window
    power = torch.fft.rfft(centred).abs() ** 2 / (window**2).sum().clamp(min=_FLOOR)
    return torch.log((power * whole[..., None]).sum(-2) / whole.sum(-1)[:, None] + _FLOOR)


def running_windows(values: torch.Tensor, size: int) -> torch.Tensor:
    """The last `size` values up to each position: [B, T, size] of [B, T], zeros where there are none yet."""
    return torch.nn.functional.pad(values, (size, 0)).unfold(-1, size, 1)[:, 1:]


def running_spectrum(windows: torch.Tensor) -> torch.Tensor:
    """Features [..., 3 F] of windows [..., N]: the real and imaginary parts of their DFT over sqrt(N), and log(1 + power).

    The next value changes the power at frequency k by 2 v Re(X_k e^{...}) + v^2, which is why the parts are given.
    """
    size = windows.shape[-1]
    count = torch.arange(size, device=windows.device)
    turns = (count[:, None] * count[: size // 2 + 1] % size).to(windows.dtype) / size
    angle = 2 * math.pi * turns
    real, imag = windows @ angle.cos() / math.sqrt(size), windows @ angle.sin() / math.sqrt(size)
    return torch.cat([real, imag, torch.log1p(real**2 + imag**2)], dim=-1)
