"""`SpectralReward`: r(x) = r_task(x) - gamma * D(S_x, E[S_c]), the texture of a forecast.

See docs/guides/rewards.md.

With r_task = 0 only the product lambda * gamma matters to any sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sdt_dist.data.scale import fit_scale
from sdt_dist.errors import ConfigurationError, ContextError
from sdt_dist.metrics.spectrum import DISTANCES, MIN_SEGMENT, power_spectrum, reference_spectrum
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.base import Reward, series_of

_MIN_PARTIAL = 16


class SpectralReward(Reward):
    """Closeness of a sample's power spectrum to the history's mean spectrum over segments as long as the sample.

    reference: the history [L]; samples and history are standardised by its mean and std. gamma: weight of the
    distance. distance: log_l1 (default), wasserstein or kl (`metrics.spectrum`). segment: Welch segment, default half
    the sample's length. Samples need `min_horizon` values, one segment: 4 unless `segment` is set. Override `task` or
    `divergence` for other terms.
    """

    has_partial = True

    def __init__(
        self,
        reference: np.ndarray,
        gamma: float = 1.0,
        distance: Literal["log_l1", "wasserstein", "kl"] = "log_l1",
        segment: int | None = None,
    ) -> None:
        if distance not in DISTANCES:
            raise ConfigurationError(
                f"spectral: distance={distance!r}, allowed: {', '.join(DISTANCES)}."
            )
        if not 0 <= gamma < np.inf:
            raise ConfigurationError(f"spectral: gamma={gamma}, must be finite and >= 0.")
        if segment is not None and not (isinstance(segment, int) and segment >= MIN_SEGMENT):
            raise ConfigurationError(
                f"spectral: segment={segment}, must be a whole number >= {MIN_SEGMENT}, or None."
            )
        self.gamma = float(gamma)
        self.distance = distance
        self.segment = segment
        self.min_horizon = segment or MIN_SEGMENT
        self._scale = fit_scale(reference)
        self._history = self._standardise(np.asarray(reference, dtype=np.float64))
        self._spectra: dict[tuple[int, int], np.ndarray] = {}

    @property
    def multipliers(self) -> dict[str, float]:
        return {"task": 1.0, "spectral": self.gamma}

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        series = series_of(samples)
        return {"task": self.task(series), "spectral": -self.divergence(self._standardise(series))}

    def task(self, series: np.ndarray) -> np.ndarray:
        """r_task [B] of series [B, L] in the user's units; 0 here."""
        return np.zeros(len(series))

    def divergence(self, standardised: np.ndarray) -> np.ndarray:
        """D [B] of standardised series [B, L]."""
        length = standardised.shape[1]
        if length < self.min_horizon:
            raise ContextError(
                f"spectral: horizon {length}, must be >= {self.min_horizon}, the length of one segment."
            )
        segment = self.segment or max(MIN_SEGMENT, length // 2)
        frequencies, spectra = power_spectrum(standardised, segment)
        return DISTANCES[self.distance](spectra, self._reference(length, segment), frequencies)

    def partial(self, samples: Sequence[Decoded]) -> np.ndarray:
        """-gamma D of what is there so far, 0 while it is shorter than 16 values."""
        series = self._standardise(series_of(samples))
        if series.shape[1] < max(_MIN_PARTIAL, self.segment or 0):
            return np.zeros(len(series))
        return -self.gamma * self.divergence(series)

    def _standardise(self, series: np.ndarray) -> np.ndarray:
        return (series - self._scale.loc) / self._scale.scale

    def _reference(self, length: int, segment: int) -> np.ndarray:
        key = (length, segment)
        if key not in self._spectra:
            self._spectra[key] = reference_spectrum(self._history, length, segment)
        return self._spectra[key]
