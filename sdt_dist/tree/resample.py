"""Drawing samples from weighted finished sequences, and the effective sample size."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp


def log_sum(log_values: np.ndarray) -> float:
    """log sum exp of an array [N] as a plain float."""
    return float(np.asarray(logsumexp(log_values)))


def normalise(log_weights: np.ndarray) -> np.ndarray:
    """Probabilities [N] from log-weights [N]; uniform where every weight is zero."""
    total = log_sum(log_weights)
    if not np.isfinite(total):
        return np.full(len(log_weights), 1.0 / len(log_weights))
    return np.exp(log_weights - total)


def effective_sample_size(log_weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2 (Kish)."""
    return float(np.exp(2 * log_sum(log_weights) - log_sum(2 * log_weights)))


def systematic(probabilities: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices by systematic resampling, in random order: each one is a draw from `probabilities`.

    Low variance: index i appears floor or ceil of count * probabilities[i] times (Douc and Cappe 2005).
    """
    edges = np.cumsum(probabilities)
    points = (rng.random() + np.arange(count)) / count * edges[-1]
    return rng.permutation(np.minimum(np.searchsorted(edges, points, side="right"), len(edges) - 1))
