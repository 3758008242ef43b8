"""Screening by re-weighting: exact where the evidence is exhausted, and told where it is too thin.

See docs/concepts/exactness.md#shared-evidence, docs/guides/sweeps.md.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import ConfigurationError
from sdt_dist.models.loading import load_model
from sdt_dist.tune.config import load_sweep, problems_of
from sdt_dist.tune.objectives import measure_rows
from sdt_dist.tune.screening import (
    LEAST_ESS,
    Cell,
    Screen,
    agreement,
    decoder_of,
    first_points,
    row_of_law,
    run_screening,
    write_screening,
)
from sdt_dist.values.extract import walks_of
from sdt_dist.values.reweigh import Reweighed, reweigh
from tests.evaluation_helpers import evaluate_into
from tests.search_helpers import run_toy, toy

PROBLEM = ForecastProblem(
    0, "toy", np.arange(64.0) % 5, np.array([1.0, 3.0, 0.0, 2.0]), 1, 2.0, 1.5
)


def values(problem: ForecastProblem, tokens: np.ndarray) -> np.ndarray:
    return tokens.astype(np.float64)


def law_of(name: str, strength: float, multiplier: float) -> Reweighed:
    """The law p exp(lambda m r) of a toy itself, from its tables."""
    model = toy(name)
    log_weights = model.log_prior + strength * multiplier * model.rewards
    probabilities = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    sequences = [model.sequence(index) for index in range(len(probabilities))]
    return Reweighed(
        0.0, 0.0, 1.0, True, sequences, model.rewards, model.log_prior, probabilities, []
    )


@pytest.mark.parametrize(("strength", "multiplier"), [(0.5, 1.0), (2.0, 3.0), (40.0, 0.5)])
def test_exhausted_evidence_gives_the_objectives_of_the_law_itself_at_any_tilt(
    strength, multiplier
):
    walks = walks_of(run_toy("A", "residual_ts", 0, num_rollouts=1000).snapshot, "run")
    found = reweigh(walks, {"toy": multiplier}, strength)
    want = law_of("A", strength, multiplier)
    assert found.exhausted and found.sequences == want.sequences
    np.testing.assert_allclose(found.probabilities, want.probabilities, atol=1e-12)
    rows = [row_of_law(law, PROBLEM, values, 400, seed=3) for law in (found, want)]
    assert rows[0] == rows[1]
    have, expected = (
        measure_rows({0: row}, [PROBLEM], ["crps", "spec_w1_gap", "mase"]) for row in rows
    )
    assert have == expected and set(have) == {"crps", "spec_w1_gap", "mase"}


def test_partial_evidence_comes_near_the_law_where_its_ess_is_large():
    walks = walks_of(run_toy("A", "residual_ts", 0, num_rollouts=400).snapshot, "run")
    law = reweigh(walks, {"toy": 1.0}, 1.0)
    exact = law_of("A", 1.0, 1.0)
    assert not law.exhausted and law.ess > LEAST_ESS
    have, want = (row_of_law(one, PROBLEM, values, 2000, seed=0)["crps"] for one in (law, exact))
    assert have == pytest.approx(want, rel=0.1)


SETTINGS = {
    "dataset": "co2",
    "num_problems": 2,
    "horizon": 8,
    "context_length": 64,
    "num_samples": 12,
}
SPACE = {"inverse_temperature": {"low": 0.1, "high": 400, "log": True}, "gamma": [0.5, 2.0]}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> str:
    """Evidence of the bundled forecaster on two problems."""
    folder = tmp_path_factory.mktemp("evidence")
    settings = SETTINGS | {
        "split": "val",
        "methods": ["residual_ts"],
        "num_rollouts": 24,
        "keep_evidence": True,
    }
    evaluate_into(folder, settings)
    return str(folder)


@pytest.mark.usefixtures("one_thread")
def test_a_grid_is_ranked_without_a_model_and_thin_cells_come_last_and_begin_nothing(
    kept, tmp_path
):
    sweep = load_sweep(
        None, {"evaluation": SETTINGS, "methods": ["residual_ts"], "space": SPACE, "screen": kept}
    )
    problems = problems_of(sweep)
    cells = run_screening(sweep, problems, kept)
    assert len(cells) == 12 and {cell.gamma for cell in cells} == {0.5, 2.0}
    strong = [cell for cell in cells if cell.inverse_temperature == 400 and cell.gamma == 2.0]
    weak = [cell for cell in cells if cell.inverse_temperature == 0.1]
    assert not strong[0].believable and all(
        cell.believable and cell.ess > LEAST_ESS for cell in weak
    )
    trusted = [cell.objectives["crps"]["mean"] for cell in cells if cell.believable]
    assert trusted == sorted(trusted) and [cell.believable for cell in cells] == [True] * len(trusted) + [False] * (12 - len(trusted))  # fmt: skip
    first = first_points(sweep, cells)
    assert first[0] == {
        "inverse_temperature": cells[0].inverse_temperature,
        "gamma": cells[0].gamma,
    }
    assert all(Cell(**{**vars_of(cell)}).believable for cell in cells[: len(first)])
    write_screening(tmp_path, sweep, cells, kept)
    assert (tmp_path / "screening.json").stat().st_size > 0


def vars_of(cell: Cell) -> dict:
    return {name: getattr(cell, name) for name in Cell.__slots__}


@pytest.mark.usefixtures("one_thread")
def test_tokens_are_decoded_as_the_forecasters_process_decodes_them(kept):
    sweep = load_sweep(None, {"evaluation": SETTINGS, "methods": ["residual_ts"], "space": SPACE})
    problem = problems_of(sweep)[0]
    process = load_model("bundled").process(8)
    tokens = np.random.default_rng(0).integers(2, 1024, (3, 8))
    want = [
        one.series
        for one in process.decode(
            process.root(problem.history), [tuple(row) for row in tokens.tolist()]
        )
    ]
    np.testing.assert_array_equal(decoder_of(sweep.base)(problem, tokens), np.array(want))


def test_evidence_of_other_problems_is_refused_and_so_is_nothing_to_screen(kept):
    sweep = load_sweep(
        None,
        {"evaluation": SETTINGS | {"num_problems": 3}, "methods": ["residual_ts"], "space": SPACE},
    )
    with pytest.raises(ConfigurationError, match=r"screen: .* holds evidence of 2 of 3 problems"):
        Screen(kept, sweep.base, problems_of(sweep))
    other = load_sweep(None, {"methods": ["residual_ts"], "space": {"epsilon": [0.1, 0.2]}})
    with pytest.raises(ConfigurationError, match="neither inverse_temperature nor gamma is swept"):
        run_screening(other, [], kept)


def test_agreement_is_a_rank_correlation_and_needs_three_points():
    assert agreement([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0])["rho"] == pytest.approx(0.8)
    assert (
        agreement([1.0, 2.0], [1.0, 2.0]) is None
        and agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    )
