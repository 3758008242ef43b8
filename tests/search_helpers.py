"""Shared by the search tests: the toys of SPEC 1.4 and runs over them."""

from __future__ import annotations

from functools import cache

import numpy as np

from sdt_dist.errors import SdtError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem

PARAMETERS = {
    "A": (5, 4, 1.0, "smooth", 5.0, 0),
    "B": (60, 2, 1.5, "smooth", 20.0, 0),
    "C": (5, 6, 1.0, "smooth", 20.0, 0),
    "D": (30, 3, 1.2, "smooth", 5.0, 0),
    "U": (3, 3, 1.0, "smooth", 5.0, 1),
}


@cache
def toy(name: str) -> Toy:
    return Toy(*PARAMETERS[name])


def run_toy(name: str, method: str, seed: int, reward=None, index: int = 0, **options) -> SearchResult:
    """One search of a toy with a fresh model (so that its counters start at 0)."""
    model = Toy(*PARAMETERS[name])
    process = TokenProcess(model, model.law, model.length)
    problem = SearchProblem(index, process.root([0]), reward or model)
    options = {"inverse_temperature": model.inverse_temperature} | options
    ((_, outcome),) = run_searches(process, [problem], method=method, options=options, seed=seed)
    if isinstance(outcome, SdtError):
        raise outcome
    return outcome


def law_of(result: SearchResult, model: Toy) -> np.ndarray:
    """A result's distribution() as an array [V^T]."""
    law = np.zeros(len(model.target))
    for tokens, probability in result.distribution():
        law[model.index(tokens)] += probability
    return law


def total_variation(law: np.ndarray, model: Toy) -> float:
    return float(0.5 * np.abs(law - model.target).sum())


def mean_total_variation(name: str, method: str, num_rollouts: int, seeds: range, **options) -> float:
    model = toy(name)
    runs = [run_toy(name, method, seed, num_rollouts=num_rollouts, **options) for seed in seeds]
    return float(np.mean([total_variation(law_of(run, model), model) for run in runs]))
