"""Forecast the next day of load.csv with the model on board, and say how sure the search is.

python examples/forecast.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

import sdt_dist as sdt

HORIZON = 24

table = pd.read_csv(Path(__file__).with_name("load.csv"), index_col="date", parse_dates=["date"])
history = table["load"].to_numpy()

# Samples that keep the power spectrum of the history: lambda says how much that counts.
result = sdt.search(
    sdt.load_model("bundled"),
    history,
    sdt.SpectralReward(history, gamma=1.0),
    method="snis",
    inverse_temperature=3.0,
    max_new_tokens=HORIZON,
    num_rollouts=100,
    num_samples=100,
)
print(result)

paths = np.stack([sample.series for sample in result.samples])  # [samples, HORIZON]
quantiles = {f"q{level:g}": np.quantile(paths, level, axis=0) for level in (0.1, 0.5, 0.9)}
index = pd.date_range(table.index[-1], periods=HORIZON + 1, freq="h", name="date")[1:]
print(pd.DataFrame(quantiles, index=index).round(2).to_string())
