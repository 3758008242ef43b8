"""Shared by the search tests: the toys of docs/concepts/exactness.md#toys and runs over them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from sdt_dist.errors import SdtError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import Flow
from sdt_dist.search.api import open_search, run_searches
from sdt_dist.search.driver import drive
from sdt_dist.search.methods import validate_options
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


def run_toy(
    name: str, method: str, seed: int, reward=None, index: int = 0, **options
) -> SearchResult:
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


def run_seeds(
    name: str, method: str, seeds: Sequence[int], flow: Flow | None = None, **options
) -> list[SearchResult]:
    """The searches of `run_toy` with these seeds, in this order, beside each other, so that a model call serves them all."""
    model = Toy(*PARAMETERS[name])
    process = TokenProcess(model, model.law, model.length)
    if flow is not None:
        process.load_flow(flow)
    given = validate_options(method, {"inverse_temperature": model.inverse_temperature} | options)
    problem = SearchProblem(0, process.root([0]), model)
    identity = None if flow is None else flow.identity
    searches = (
        open_search(
            process,
            problem,
            method=method,
            options=given,
            seed=seed,
            cache_name=str(seed),
            flow=identity,
        )
        for seed in seeds
    )
    outcomes = [outcome for _, outcome in drive(process, searches, in_flight=len(seeds))]
    for outcome in outcomes:
        if isinstance(outcome, SdtError):
            raise outcome
    return sorted(outcomes, key=lambda outcome: seeds.index(outcome.seed))


def mean_total_variation(
    name: str,
    method: str,
    num_rollouts: int,
    seeds: Sequence[int],
    flow: Flow | None = None,
    **options,
) -> float:
    """Mean total variation between distribution() and pi* over search seeds."""
    model = toy(name)
    runs = run_seeds(name, method, seeds, flow, num_rollouts=num_rollouts, **options)
    return float(np.mean([total_variation(law_of(run, model), model) for run in runs]))
