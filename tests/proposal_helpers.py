"""Tabular flows on toys: the exact soft value, noisy, wrong and constant ones.

See docs/concepts/flow.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdt_dist.errors import SdtError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import State
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from tests.search_helpers import PARAMETERS, mean_total_variation, toy


class TableFlow:
    """F(s) from tables [V^t] of every depth t; its values do not depend on lambda."""

    def __init__(self, identity: str, model: Toy, tables: Sequence[np.ndarray]) -> None:
        self.identity = identity
        self._model = model
        self._tables = tables

    def log_tilts(
        self, states: Sequence[State], inverse_temperature: float, log_prob: np.ndarray
    ) -> np.ndarray:
        size = self._model.vocab_size
        rows = [
            self._tables[len(tokens) + 1][
                self._model.index(tokens) * size : (self._model.index(tokens) + 1) * size
            ]
            for _, tokens in states
        ]
        return inverse_temperature * np.stack(rows)

    def values(self, states: Sequence[State], inverse_temperature: float) -> np.ndarray:
        return np.array(
            [self._tables[len(tokens)][self._model.index(tokens)] for _, tokens in states]
        )


def flow_of(name: str, kind: str, noise_nats: float = 1.0) -> TableFlow:
    """A flow of a toy: "exact", "noisy" (lambda F off by Gaussian noise in nats), "opposite" (-V), "shuffled", "constant"."""
    model = toy(name)
    rng = np.random.default_rng(17)
    strength = model.inverse_temperature
    change = {
        "exact": lambda v: v,
        "noisy": lambda v: v + noise_nats / strength * rng.standard_normal(v.shape),
        "opposite": lambda v: -v,
        "shuffled": lambda v: rng.permutation(v),
        "constant": lambda v: np.full(v.shape, 0.7),
    }[kind]
    return TableFlow(
        f"{name}/{kind}/{noise_nats}", model, [change(values) for values in model.soft_values]
    )


def run_with_flow(
    name: str, method: str, flow: TableFlow | None, seeds: Sequence[int] | range, **options
):
    """One search a seed (as the problem's index too) of a toy with a fresh model."""
    return [_one(name, method, flow, seed, options) for seed in seeds]


def _one(name: str, method: str, flow: TableFlow | None, seed: int, options: dict) -> SearchResult:
    model = Toy(*PARAMETERS[name])
    process = TokenProcess(model, model.law, model.length)
    problem = SearchProblem(0, process.root([0]), model)
    options = {"inverse_temperature": model.inverse_temperature} | options
    ((_, outcome),) = run_searches(
        process, [problem], method=method, options=options, seed=seed, flow=flow
    )
    if isinstance(outcome, SdtError):
        raise outcome
    return outcome


def ratios(
    name: str, method: str, flow: TableFlow | None, num_runs: int, seed: int = 1, **options
) -> np.ndarray:
    """Z-hat / Z of many searches of a toy at its own lambda."""
    model = toy(name)
    process = TokenProcess(model, model.law, model.length)
    problems = [SearchProblem(i, process.root([0]), model) for i in range(num_runs)]
    options = {"inverse_temperature": model.inverse_temperature} | options
    runs = run_searches(
        process, problems, method=method, options=options, seed=seed, in_flight=512, flow=flow
    )
    return np.exp([run.log_z - model.log_z for _, run in runs if isinstance(run, SearchResult)])


def mean_tv(name: str, method: str, flow: TableFlow | None, seeds: range, **options) -> float:
    """Mean total variation between distribution() and pi* over search seeds."""
    return mean_total_variation(name, method, seeds=seeds, flow=flow, **options)
