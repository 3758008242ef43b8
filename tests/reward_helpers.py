"""Shared by the reward tests: a history, sample series, and samples from series and texts."""

from __future__ import annotations

import numpy as np

from sdt_dist.protocols import Decoded

HISTORY = np.random.default_rng(0).standard_normal(200).cumsum()
SERIES = np.random.default_rng(1).standard_normal((12, 32)).cumsum(axis=1)


def decoded(series) -> list[Decoded]:
    return [Decoded((), series=np.asarray(row, dtype=np.float64)) for row in series]


def texts(*values: str) -> list[Decoded]:
    return [Decoded(tuple(range(len(value))), text=value) for value in values]
