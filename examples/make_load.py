"""A small hourly series of our own: `python examples/make_load.py` writes examples/load.csv again, byte for byte.

It is no measurement: a daily and a weekly rhythm of a load in MW, weather that drifts, and noise, from one seed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

HOURS = 24 * 38
TARGET = Path(__file__).with_name("load.csv")


def autoregression(rng: np.random.Generator, memory: float, shock: float) -> np.ndarray:
    """A series [HOURS] in which every value keeps `memory` of the one before."""
    values = np.zeros(HOURS)
    shocks = shock * rng.standard_normal(HOURS)
    for hour in range(1, HOURS):
        values[hour] = memory * values[hour - 1] + shocks[hour]
    return values


def bump(hour_of_day: np.ndarray, centre: float, width: float) -> np.ndarray:
    """A peak [HOURS] of height 1 that comes every day."""
    return np.exp(-0.5 * ((hour_of_day - centre) / width) ** 2)


def make_load(seed: int = 7) -> pd.DataFrame:
    """Columns time (hourly), load (MW) and temperature (degrees Celsius)."""
    rng = np.random.default_rng(seed)
    hours = np.arange(HOURS)
    hour_of_day = hours % 24
    is_weekend = (hours // 24) % 7 >= 5

    weather = 3 * autoregression(rng, 0.985, 0.17)
    temperature = 6 + weather + 3 * np.sin(2 * np.pi * (hours - 9) / 24)

    peaks = 0.7 * bump(hour_of_day, 8, 2.0) + bump(hour_of_day, 19, 2.6)
    people = np.where(is_weekend, 0.72 * peaks, peaks)
    base = np.where(is_weekend, 36.0, 40.0)
    load = base + 22 * people - 0.8 * (temperature - 6) + autoregression(rng, 0.4, 1.1)

    times = pd.date_range("2025-01-06", periods=HOURS, freq="h")
    return pd.DataFrame({"time": times, "load": load.round(2), "temperature": temperature.round(1)})


if __name__ == "__main__":
    make_load().to_csv(TARGET, index=False)
