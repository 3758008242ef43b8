"""Tasks: records that come back, measures that need the truth, contexts that do not have it; and what a MODEL SPEC would be."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from sdt_dist.data.problems import load_problems
from sdt_dist.errors import ConfigurationError
from sdt_dist.evaluation.tables import columns_of, columns_of_tests
from sdt_dist.models.card import card_of
from sdt_dist.models.kinds import KINDS
from sdt_dist.models.loading import load_model
from sdt_dist.models.spec import outlook_of
from sdt_dist.models.toy import Toy
from sdt_dist.report.figures.draw import OF_EVERY_SEARCH, PAINTERS
from sdt_dist.rewards.context import RewardContext
from sdt_dist.tasks.registry import TASKS, get_task

FORECAST = get_task("forecast")


@pytest.fixture(scope="module")
def problem():
    (found,) = load_problems("sunspots", horizon=12, num_problems=1)
    return found


def test_an_unknown_task_is_named_with_those_that_there_are():
    with pytest.raises(ConfigurationError, match=r"task.*'forecasts'.*forecast"):
        get_task("forecasts")


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_task_names_measures_and_figures_that_exist(task):
    shown = {column.metric for column in columns_of(task)}
    assert {*task.intervals, *task.compared, *task.tested, *task.ratios} <= shown
    assert [column.metric for column in columns_of_tests(task)] == list(task.tested)
    assert {*OF_EVERY_SEARCH, *task.figures} <= set(PAINTERS)


def test_a_problem_comes_back_from_its_record(problem):
    again = FORECAST.problem_of(json.loads(json.dumps(FORECAST.record(problem))))
    for field in fields(problem):
        if field.name != "timestamps":
            np.testing.assert_array_equal(getattr(again, field.name), getattr(problem, field.name))


def test_the_truth_is_measured_against_and_never_shown(problem):
    other = replace(problem, truth=problem.truth[::-1].copy())
    samples = [problem.truth.tolist(), other.truth.tolist()]
    assert FORECAST.measures(samples, problem) != FORECAST.measures(samples, other)
    seen = [RewardContext.of(one.context) for one in (problem, other)]
    assert seen[0].history is seen[1].history is problem.history
    assert FORECAST.length_of(problem) == 12


def test_the_stand_in_for_a_sample_is_made_of_the_context_alone(problem):
    for count in (12, len(problem.history) + 3):
        decoded = FORECAST.stand_in(problem.context, count)
        assert decoded.series is not None and decoded.series.shape == (count,)
        assert set(decoded.series) <= set(problem.history)


def test_a_model_spec_says_what_the_model_will_say():
    outlook = outlook_of("bundled")
    loaded = load_model("bundled")
    card = card_of(loaded, "bundled")
    states = loaded.process(24).states
    assert (
        outlook.sample_view
        == loaded.sample_view
        == card.sample_view
        == states.sample_view
        == "series"
    )
    assert outlook.context_length == card.context_length == states.context_length
    assert outlook.is_small and states.are_tokens_ordered
    low, high = card.token_values or (0.0, 0.0)
    assert low == -high < 0 and card.allowed == states.law.allowed
    root = outlook.states(24).root(np.sin(np.arange(60.0)))
    assert root.prompt == states.root(np.sin(np.arange(60.0))).prompt


def test_what_is_not_seen_to_be_a_forecaster_passes_for_a_language_model(tmp_path: Path):
    for spec, path in (
        ("owner/name", None),
        (str(tmp_path), tmp_path),
        ("http://127.0.0.1:1", None),
    ):
        outlook = outlook_of(spec)
        assert (outlook.kind, outlook.sample_view, outlook.path) == ("language", "tokens", path)
        assert outlook.context_length is None and not outlook.is_small
    assert (
        outlook_of("mlx:bundled").sample_view == "series" and not outlook_of("mlx:bundled").is_small
    )


def test_a_card_of_token_ids_has_no_numbers():
    card = card_of(Toy(5, 4, 1.0), "toy")
    assert card.kind == "tokens" and set(KINDS) == {"forecaster", "language", "tokens"}
    assert card.token_values is card.context_length is None
    assert card.sample_view == "tokens" and card.allowed == (0, 5)
