"""What a report shows, read back from its page, and the same numbers recomputed from the files of a run alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scoringrules
from scipy.stats import bootstrap

from sdt_dist.metrics.forecast import spectral_measures

COSTS = ["nfe", "model_calls", "rollouts", "reward_calls", "recomputed_tokens", "wall_s"]


class Page(HTMLParser):
    """The cells of a report by (table, run, label, metric), its addresses, scripts' trees and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.cells: dict[tuple[str, str, str, str], dict] = {}
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.trees: list[dict] = []
        self.text = ""
        self._table = ""
        self._cell = None
        self._is_code = False
        self.source = source
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [
            found[name] for name in ("src", "href", "srcset", "action", "data") if name in found
        ]
        self.anchors |= {found["id"]} if "id" in found else set()
        self._is_code = tag in ("script", "style")
        if tag == "table":
            self._table = found["data-table"]
        if tag == "td" and found["data-metric"]:
            self._cell = {"numbers": {k[5:]: v for k, v in found.items()}, "lines": []}
            place = (self._table, *(found[f"data-{name}"] for name in ("run", "label", "metric")))
            assert place not in self.cells
            self.cells[place] = self._cell
        if "data-tree" in found:
            self.trees.append(json.loads(found["data-tree"]))

    def handle_endtag(self, tag):
        self._is_code = False
        if tag == "td":
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None and data.strip():
            self._cell["lines"].append(data.strip())
        if not self._is_code:
            self.text += " " + data

    def of(self, table: str) -> dict[tuple[str, str, str], dict]:
        """{(run, label, metric): cell} of the cells of one table that hold a number."""
        return {
            place[1:]: cell
            for place, cell in self.cells.items()
            if place[0] == table and cell["lines"] != ["–"]
        }


def lines_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def measures_of(directory: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Measures by label and problem, from samples.jsonl and problems.json with numpy and scoringrules."""
    problems = {
        record["index"]: record for record in json.loads((directory / "problems.json").read_text())
    }
    table: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines_of(directory):
        problem = problems[line["problem"]]
        samples = np.array(line["samples"])
        truth = np.array(problem["truth"])
        history = np.array(problem["history"])
        z, z_truth, z_history = (
            (x - problem["loc"]) / problem["scale"] for x in (samples, truth, history)
        )
        low, high = np.quantile(samples, [0.1, 0.9], axis=0)
        season = problem["season"]
        naive = np.mean(np.abs(history[season:] - history[:-season]))
        levels = np.arange(1, 10) / 10
        pinball = [
            np.maximum(q * (truth - x), (q - 1) * (truth - x))
            for q, x in zip(levels, np.quantile(samples, levels, axis=0), strict=True)
        ]
        table.setdefault(line["label"], {})[line["problem"]] = {
            "crps": float(np.mean([scoringrules.crps_ensemble(t, z[:, i], estimator="fair") for i, t in enumerate(z_truth)])),
            "wql_loss": 2 * float(np.sum(np.mean(pinball, axis=0))),
            "wql_scale": float(np.abs(truth).sum()),
            "mase": float(np.mean(np.abs(np.median(samples, axis=0) - truth)) / naive),
            "coverage_80": float(np.mean((low <= truth) & (truth <= high))),
            **spectral_measures(z, z_history),
            "reward_mean": float(np.mean(line["rewards"])),
            "reward_best": line["best_reward"],
            "ess": line["ess"],
            "log_z": line["log_z"],
            "distinct_samples": len({tuple(tokens) for tokens in line["tokens"]}),
            **{name: line[name] for name in COSTS},
        }  # fmt: skip
    return table


def true_spectra(directory: Path) -> dict[int, dict[str, float]]:
    """The spectral measures of every true future by problem, from problems.json."""
    records = json.loads((directory / "problems.json").read_text())
    series = {
        r["index"]: [(np.array(r[x]) - r["loc"]) / r["scale"] for x in ("truth", "history")]
        for r in records
    }
    return {
        index: spectral_measures(truth[None], history) for index, (truth, history) in series.items()
    }


def column_of(rows: dict[int, dict[str, float]], metric: str) -> np.ndarray:
    return np.array([row[metric] for row in rows.values() if row[metric] is not None], dtype=float)


def interval_of(
    *columns: np.ndarray, statistic=lambda x, axis: np.mean(x, axis=axis)
) -> tuple[float, float]:
    if all(np.ptp(column) == 0 for column in columns):
        value = float(statistic(*columns, axis=-1))
        return value, value
    found = bootstrap(
        columns,
        statistic,
        paired=len(columns) > 1,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return tuple(found.confidence_interval)


def holm(values: dict) -> dict:
    """Holm (1979): the i-th smallest of m times m - i + 1, made monotone, at most 1."""
    order = sorted(values, key=values.get)
    found = {}
    running = 0.0
    for place, key in enumerate(order):
        running = max(running, min(1.0, values[key] * (len(order) - place)))
        found[key] = running
    return found


def as_printed(text: str) -> tuple[float, float]:
    """A number as printed and half of its last place."""
    digits = len(text.partition(".")[2])
    return float(text.replace(",", "")), 0.5 * 10.0**-digits * (1 + 1e-6)


def check_cell(cell: dict, mean: float, low: float, high: float) -> None:
    """The visible mean and interval, and the full numbers behind them."""
    shown = [
        cell["lines"][0],
        *re.findall(r"[-+\d.,]+(?=[,\]])", cell["lines"][1] if len(cell["lines"]) > 1 else ""),
    ]
    wanted = [mean, low, high] if len(shown) == 3 else [mean]
    assert low == high or len(shown) == 3
    for text, value in zip(shown, wanted, strict=True):
        printed, half = as_printed(text)
        assert printed == pytest.approx(value, abs=half)
    for name, value in (("mean", mean), ("low", low), ("high", high)):
        assert float(cell["numbers"][name]) == pytest.approx(value, rel=1e-9, abs=1e-12)
