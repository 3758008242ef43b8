"""Write load.csv, the series of the other examples: four weeks of an hourly load, made up.

    python examples/make_series.py [FILE]

A day has a morning and an evening peak, a weekend is lower, and what is left is an AR(1) process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

HOURS = 24 * 7 * 4
SEED = 0


def load() -> pd.DataFrame:
    """The series: `date`, hourly from a Monday on, and `load` in megawatts with two decimals."""
    hour = np.arange(HOURS)
    time = hour % 24
    weekday = hour // 24 % 7
    morning = 9.0 * np.exp(-(((time - 8) / 2.5) ** 2))
    evening = 14.0 * np.exp(-(((time - 19) / 3.0) ** 2))
    weekend = np.where(weekday >= 5, -6.0, 0.0)
    values = 42.0 + morning + evening + weekend + _noise()
    dates = pd.date_range("2024-01-01", periods=HOURS, freq="h")
    return pd.DataFrame({"date": dates, "load": values.round(2)})


def _noise(correlation: float = 0.7, spread: float = 1.2) -> np.ndarray:
    """An AR(1) process with this standard deviation [HOURS]."""
    steps = np.random.default_rng(SEED).normal(0.0, spread * np.sqrt(1 - correlation**2), HOURS)
    noise = np.zeros(HOURS)
    for i in range(1, HOURS):
        noise[i] = correlation * noise[i - 1] + steps[i]
    return noise


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("load.csv")
    load().to_csv(target, index=False, float_format="%.2f")
