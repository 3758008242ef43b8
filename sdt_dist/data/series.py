"""One channel of a dataset, as values in time order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True, slots=True)
class Series:
    """values [N] of one channel. `splits` maps a split to the half-open range of rows its targets may use.

    (loc, scale) standardise it for metrics: by the training part where the dataset defines one, else None, and each
    problem uses its own history.
    """

    name: str
    values: np.ndarray
    season: int
    timestamps: pd.DatetimeIndex | None = None
    splits: dict[str, tuple[int, int]] | None = None
    loc: float | None = None
    scale: float | None = None
