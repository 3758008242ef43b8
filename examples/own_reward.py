"""A reward of one's own: forecasts whose daily peak stays below a limit.

    python examples/own_reward.py
    sdt forecast examples/load.csv --reward examples/own_reward.py:peak_below_limit

A reward takes the finished samples of one problem together and returns a number for each. It may look
at the history, never at the true future.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

LIMIT = 57.0  # megawatts


def peak_below_limit(series: np.ndarray) -> np.ndarray:
    """Minus how far the highest of the values [samples, horizon] is above the limit; [samples]."""
    return -np.maximum(series.max(axis=1) - LIMIT, 0.0)


def main() -> None:
    """How often the limit is broken, by the model alone and with the reward."""
    import pandas as pd

    import sdt_dist as sdt

    history = pd.read_csv(Path(__file__).with_name("load.csv"))["load"].to_numpy()
    model = sdt.load_model("bundled")
    for method, budget in (("sample", {}), ("snis", {"num_rollouts": 200})):
        result = sdt.search(
            model,
            history,
            peak_below_limit,
            method=method,
            inverse_temperature=2.0,
            max_new_tokens=24,
            num_samples=100,
            **budget,
        )
        peaks = np.array([sample.series.max() for sample in result.samples])
        print(f"{method}: {np.mean(peaks > LIMIT):.0%} of the samples go above {LIMIT:g} MW")


if __name__ == "__main__":
    main()
