"""Dynamic time warping by dtaidistance's compiled code: the one place for rewards and metrics.

See docs/guides/rewards.md, docs/guides/evaluate.md.
"""

from __future__ import annotations

import numpy as np
from dtaidistance import dtw


def dtw_distances(series: np.ndarray, template: np.ndarray) -> np.ndarray:
    """DTW distances [B] of series [B, L] to a template [M]: the root of the least sum of squared differences.

    No window and no penalty. Pruning is off: its bound comes from a sum in another order, and ties would round apart.
    """
    rows, target = (np.ascontiguousarray(values, dtype=np.float64) for values in (series, template))
    return np.array([dtw.distance_fast(row, target, use_pruning=False) for row in rows])
