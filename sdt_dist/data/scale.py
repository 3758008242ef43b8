"""How a history is standardised: by its own mean and standard deviation, in one place for models, rewards and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdt_dist.errors import ContextError

MIN_HISTORY = 16


@dataclass(frozen=True, slots=True)
class Scale:
    """The affine map of one history: value = loc + scale * z, in the user's units."""

    loc: float
    scale: float


def fit_scale(history: np.ndarray) -> Scale:
    """Mean and standard deviation of a history [L]; ContextError when it is short, not finite or constant."""
    values = np.asarray(history, dtype=np.float64)
    if values.ndim != 1 or len(values) < MIN_HISTORY:
        raise ContextError(
            f"history: shape {values.shape}, allowed: one dimension with at least {MIN_HISTORY} values."
        )
    if not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ContextError(
            f"history: {values[position]} at position {position}, allowed: finite values; fill gaps."
        )
    loc = float(values.mean())
    scale = float(values.std())
    if scale <= 1e-12 * max(1.0, abs(loc)):
        raise ContextError(
            "history: constant, so it has no scale; a constant series needs no model."
        )
    return Scale(loc, scale)
