"""Whether Ray Tune's state is restored: only where it is whole and knows every trial that is on disk.

See docs/guides/sweeps.md.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdt_dist.tune.config import load_sweep
from sdt_dist.tune.ledger import Ledger, line_of, read_trials, write_trials
from sdt_dist.tune.scheduler import scheduler_of
from sdt_dist.tune.state import ended_rungs, is_restorable, known_parameters, set_aside
from sdt_dist.tune.trial import PARAMETERS, trial_directory, trial_name

ONE = {"method": "snis", "inverse_temperature": 1.0}
TWO = {"method": "snis", "inverse_temperature": 2.0}


@pytest.fixture
def state(tmp_path) -> Path:
    """What Tune leaves of a sweep with one trial."""
    folder = tmp_path / "tune"
    folder.mkdir()
    trials = [[json.dumps({"config": ONE}), "{}"]]
    (folder / "experiment_state-2026.json").write_text(json.dumps({"trial_data": trials}))
    for name in ("tuner.pkl", "searcher-state-2026.pkl", "search_gen_state-2026.json"):
        (folder / name).write_bytes(pickle.dumps({}))
    return folder


def test_a_whole_state_is_restored_and_one_without_the_newest_trial_is_not(state):
    assert is_restorable(state, []) and is_restorable(state, [ONE])
    assert not is_restorable(state, [ONE, TWO])


@pytest.mark.parametrize(
    "name",
    [
        "experiment_state-2026.json",
        "tuner.pkl",
        "searcher-state-2026.pkl",
        "search_gen_state-2026.json",
    ],
)
def test_a_state_that_was_torn_or_has_not_all_its_files_is_not_restored_but_set_aside(state, name):
    whole = (state / name).read_bytes()
    for torn in (whole[:-1], b""):
        (state / name).write_bytes(torn)
        assert not is_restorable(state, [ONE])
    (state / name).unlink()
    assert not is_restorable(state, [ONE])
    set_aside(state)
    assert not state.exists() and state.with_name("tune-0").is_dir()
    set_aside(state)


def test_trials_are_known_by_their_directories_and_the_ended_ones_by_the_ledger(tmp_path):
    for parameters in (ONE, TWO):
        directory = trial_directory(tmp_path, parameters)
        directory.mkdir(parents=True)
        (directory / PARAMETERS).write_text(json.dumps(parameters))
    assert sorted(map(trial_name, known_parameters(tmp_path))) == sorted(
        map(trial_name, (ONE, TWO))
    )
    result = {"rungs": json.dumps([{"rollouts": 10, "objectives": {}}])}
    write_trials(tmp_path, [line_of(ONE, result, 30), line_of(TWO, None, 30, "it failed")])
    assert ended_rungs(tmp_path) == {trial_name(ONE): 10}
    assert [line.status for line in read_trials(tmp_path)] == ["stopped", "failed"]


def test_the_ledger_has_the_trials_that_have_ended_and_travels_as_a_pickle(tmp_path):
    def trial(parameters: dict, status: str, rollouts: int) -> SimpleNamespace:
        result = {
            "rollouts": rollouts,
            "rungs": json.dumps([{"rollouts": rollouts, "objectives": {}}]),
        }
        ended = status in ("TERMINATED", "ERROR")
        return SimpleNamespace(
            config=parameters, status=status, last_result=result, is_finished=lambda: ended
        )

    ledger = pickle.loads(pickle.dumps(Ledger(tmp_path, [10, 30])))
    three = {"method": "snis", "inverse_temperature": 3.0}
    trials = [trial(ONE, "TERMINATED", 30), trial(TWO, "RUNNING", 10), trial(three, "RUNNING", 10)]
    ledger.on_trial_complete(0, trials, trials[1])
    assert [(line.parameters, line.status) for line in read_trials(tmp_path)] == [
        (ONE, "finished"),
        (TWO, "stopped"),
    ]


def test_asha_judges_restored_trials_by_all_the_rungs_that_they_had():
    scheduler = scheduler_of(load_sweep(None, {"rungs": [10, 30, 90]}))
    assert scheduler is not None

    def trial(name: str, values: list[float]) -> SimpleNamespace:
        rungs = [
            {"rollouts": r, "objectives": {"crps": {"mean": v}}}
            for r, v in zip([10, 30, 90], values, strict=False)
        ]
        return SimpleNamespace(trial_id=name, last_result={"rungs": json.dumps(rungs)})

    for number in range(4):
        scheduler.on_trial_add(None, trial(str(number), [0.2 + number / 100, 0.1]))
    late = trial("late", [])
    scheduler.on_trial_add(None, late)
    assert scheduler.on_trial_result(None, late, {"rollouts": 10, "crps": 0.5}) == "STOP"
    best = trial("best", [])
    scheduler.on_trial_add(None, best)
    assert scheduler.on_trial_result(None, best, {"rollouts": 10, "crps": 0.1}) == "CONTINUE"


def test_asha_does_not_stop_a_trial_below_a_budget_that_it_had_begun_before_a_kill():
    scheduler = scheduler_of(load_sweep(None, {"rungs": [10, 30, 90]}))
    assert scheduler is not None
    answers = {}
    for begun in (0, 30, 90):
        trials = [
            SimpleNamespace(trial_id=f"{begun}-{number}", last_result=None) for number in range(6)
        ]
        for number, trial in enumerate(trials):  # each is worse than the one before it
            scheduler.on_trial_add(None, trial)
            results = (
                {"rollouts": r, "begun": begun, "crps": 0.2 + number / 10} for r in (10, 30, 90)
            )
            answers[begun] = [scheduler.on_trial_result(None, trial, result) for result in results]
    assert answers == {
        0: ["STOP", "STOP", "STOP"],
        30: ["CONTINUE", "STOP", "STOP"],
        90: ["CONTINUE", "CONTINUE", "STOP"],
    }
