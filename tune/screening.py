"""Ranking lambda and gamma without a search: kept walks, weighed anew, give every objective but the cost.

See docs/concepts/exactness.md#shared-evidence, docs/guides/sweeps.md.

What it says holds for the evidence's own budget, and as far as its effective sample size reaches: a strong tilt moves all
weight to a few walks. It must not know Ray, trials or a model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import ConfigurationError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.evidence import EVIDENCE, evidence_keys, load_evidence
from sdt_dist.files import write_text
from sdt_dist.models.spec import outlook_of
from sdt_dist.rewards.base import series_of
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import parse_reward, with_gamma
from sdt_dist.tasks.task import Row
from sdt_dist.tree.resample import systematic
from sdt_dist.tune.config import SweepConfig, quality
from sdt_dist.tune.objectives import OBJECTIVES, Measured, measure_rows
from sdt_dist.tune.space import Parameters
from sdt_dist.values.reweigh import Reweighed, reweigh

SCREENING = "screening.json"
LEAST_ESS = 10.0  # below it a cell is a handful of walks, whatever its value
_TILT = ("inverse_temperature", "gamma")
_POINTS = 6
_FIRST = 4
_MEASURES = [name for name in OBJECTIVES if name not in ("nfe", "reward")]
_EVIDENCE_FIX = (
    "run `sdt evaluate` with keep_evidence: true on the sweep's dataset, split, problems, horizon, context length, model and "
    "reward terms"
)
Decode = Callable[[ForecastProblem, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Cell:
    """What evidence says of one (lambda, gamma). ess: mean over problems, and the least; believable: whether it suffices."""

    inverse_temperature: float
    gamma: float | None
    objectives: Measured
    ess: float
    least_ess: float
    believable: bool


class Screen:
    """The evidence of a run, for the problems of a sweep.

    ConfigurationError where the run kept none for one of these problems, or the model is no forecaster on this machine.
    """

    def __init__(
        self, directory: str | Path, config: EvaluationConfig, problems: Sequence[ForecastProblem]
    ) -> None:
        if not (Path(directory) / EVIDENCE).is_dir():
            raise ConfigurationError(f"screen: {directory} holds no evidence; {_EVIDENCE_FIX}.")
        self._config = config
        self._problems = list(problems)
        store = load_evidence(directory)
        keys = evidence_keys(config, self._problems)
        self._walks = {index: store.walks(key) for index, key in keys.items()}
        missing = [problem.name for problem in self._problems if not self._walks[problem.index]]
        if missing:
            raise ConfigurationError(
                f"screen: {directory} holds evidence of {len(keys) - len(missing)} of {len(keys)} problems, not of {missing[0]}; "
                f"{_EVIDENCE_FIX}."
            )
        self._decode = decoder_of(config)

    def at(self, inverse_temperature: float, gamma: float | None) -> Cell:
        """Objectives at (lambda, gamma), gamma None for the reward as it is."""
        spec = (
            self._config.reward if gamma is None else with_gamma(self._config.reward, float(gamma))
        )
        factory = parse_reward(spec)
        rows = {}
        ess = []
        for problem in self._problems:
            multipliers = factory.build(RewardContext.of(problem.context)).multipliers
            law = reweigh(self._walks[problem.index], multipliers, float(inverse_temperature))
            rows[problem.index] = row_of_law(
                law, problem, self._decode, self._config.num_samples, self._config.seed
            )
            ess.append(np.inf if law.exhausted else law.ess)
        shown = np.minimum(ess, [len(walks) for walks in self._walks.values()])
        return Cell(
            float(inverse_temperature),
            None if gamma is None else float(gamma),
            measure_rows(rows, self._problems, _MEASURES),
            float(shown.mean()),
            float(shown.min()),
            bool(np.median(ess) >= LEAST_ESS),
        )


def row_of_law(
    law: Reweighed, problem: ForecastProblem, decode: Decode, num_samples: int, seed: int
) -> Row:
    """Forecast measures of num_samples sequences drawn from a re-weighted law, as a search draws its own."""
    from sdt_dist.metrics.forecast import forecast_measures

    chosen = systematic(
        law.probabilities, num_samples, np.random.default_rng([seed, problem.index])
    )
    series = decode(problem, np.array([law.sequences[i] for i in chosen], dtype=np.int64))
    return forecast_measures(
        series, problem.truth, problem.history, problem.season, problem.loc, problem.scale
    )


def decoder_of(config: EvaluationConfig) -> Decode:
    """Tokens [S, H] of a problem to series, as the forecaster's process decodes them, without its weights."""
    outlook = outlook_of(config.model)
    if outlook.sample_view != "series":
        raise ConfigurationError(
            f"screen: model {config.model!r} is no forecaster on this machine, whose tokenizer reads kept walks; leave "
            "screen out, or give bundled or a directory."
        )
    states = outlook.states(config.horizon)

    def decode(problem: ForecastProblem, tokens: np.ndarray) -> np.ndarray:
        root = states.root(problem.context)
        return series_of(states.decode(root, [tuple(row) for row in tokens.tolist()]))

    return decode


def check_screen(sweep: SweepConfig) -> None:
    """ConfigurationError for a sweep that leaves nothing to screen."""
    if not set(_TILT) & set(sweep.space):
        raise ConfigurationError(
            "screen: given, but neither inverse_temperature nor gamma is swept; leave it out."
        )


def run_screening(
    sweep: SweepConfig, problems: Sequence[ForecastProblem], directory: str | Path
) -> list[Cell]:
    """The cells of the grid of lambda and gamma, those that can be believed first, the best of each first."""
    check_screen(sweep)
    base = sweep.base
    space = sweep.search_space
    screen = Screen(directory, sweep.base, problems)
    strengths = (
        space.grid("inverse_temperature", _POINTS)
        if _TILT[0] in sweep.space
        else [base.inverse_temperature]
    )
    gammas = space.grid("gamma", _POINTS) if _TILT[1] in sweep.space else [None]
    cells = [screen.at(strength, gamma) for strength, gamma in itertools.product(strengths, gammas)]
    name = quality(sweep.objectives)
    return sorted(cells, key=lambda cell: (not cell.believable, cell.objectives[name]["mean"]))


def write_screening(
    output: Path, sweep: SweepConfig, cells: Sequence[Cell], directory: str | Path
) -> None:
    """screening.json: the grid, ranked."""
    head = {
        "evidence": str(directory),
        "ranked_by": quality(sweep.objectives),
        "num_samples": sweep.base.num_samples,
        "least_ess": LEAST_ESS,
    }
    write_text(
        output / SCREENING, json.dumps(head | {"cells": [asdict(cell) for cell in cells]}, indent=1)
    )


def read_screening(output: Path) -> list[Cell]:
    """The cells of screening.json; none where there is none."""
    path = output / SCREENING
    return [Cell(**cell) for cell in json.loads(path.read_text())["cells"]] if path.exists() else []


def first_points(sweep: SweepConfig, cells: Sequence[Cell]) -> list[Parameters]:
    """Where Optuna begins: the best cells that can be believed; what they do not say it draws itself."""
    swept = [name for name in _TILT if name in sweep.space]
    return [{name: getattr(cell, name) for name in swept} for cell in cells if cell.believable][
        :_FIRST
    ]


def agreement(paid: Sequence[float], screened: Sequence[float]) -> dict[str, Any] | None:
    """Spearman's rank correlation of an objective as paid for and as screened; None for fewer than three points."""
    from scipy.stats import spearmanr

    if len(paid) < 3 or np.ptp(paid) == 0 or np.ptp(screened) == 0:
        return None
    found = spearmanr(paid, screened)
    return {"rho": float(found.statistic), "p": float(found.pvalue), "count": len(paid)}
