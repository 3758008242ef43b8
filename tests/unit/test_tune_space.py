"""A sweep's space and configuration: who has which parameter, and what is refused before anything starts.

See docs/guides/sweeps.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import pickle

import optuna
import pytest
import yaml

from sdt_dist.data.problems import load_problems
from sdt_dist.errors import ConfigurationError, DataError, MissingExtraError, SdtError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.method_options import options_of
from sdt_dist.evaluation.plan import load_config, resolve
from sdt_dist.rewards.spec import RewardContext, parse_reward
from sdt_dist.tune.choice import (
    BEST,
    HELDOUT,
    best_trial,
    chosen_evaluation,
    heldout_settings,
    importances,
    points_of,
    write_choice,
)
from sdt_dist.tune.config import SweepConfig, load_sweep, problems_of
from sdt_dist.tune.ledger import line_of, read_trials, write_trials
from sdt_dist.tune.objectives import measure_rows
from sdt_dist.tune.space import Range, Space

SPACE = {
    "inverse_temperature": {"low": 1, "high": 30, "log": True},
    "gamma": [0.5, 1, 2.0],
    "expansion_k": {"low": 2, "high": 8},
    "block_size": [None, 4],
    "epsilon": {"low": 0.1, "high": 0.5},
}
SWEEP = {"methods": ["snis", "maxent_ts", "residual_ts"], "space": SPACE, "rungs": [10, 30, 90]}


def sweep(**changes) -> SweepConfig:
    return load_sweep(None, SWEEP | changes)


def drawn(config: SweepConfig, count: int = 60) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = []
    for _ in range(count):
        trial = study.ask()
        config.search_space(trial)
        found.append(trial.params)
    return found


def test_a_trial_has_the_parameters_of_its_method_and_no_others():
    own = {
        "snis": {"inverse_temperature", "gamma"},
        "maxent_ts": {"inverse_temperature", "gamma", "expansion_k", "block_size"},
        "residual_ts": {"inverse_temperature", "gamma", "epsilon"},
    }
    trials = drawn(sweep())
    assert {trial["method"] for trial in trials} == own.keys()
    assert all(trial.keys() - {"method"} == own[trial["method"]] for trial in trials)
    widths = {trial["expansion_k"] for trial in trials if trial["method"] == "maxent_ts"}
    assert (
        widths <= set(range(2, 9))
        and all(type(width) is int for width in widths)
        and len(widths) > 2
    )
    assert all(1 <= trial["inverse_temperature"] <= 30 for trial in trials)


def test_whatever_is_drawn_is_an_evaluation_that_its_method_accepts():
    config = sweep()
    for parameters in drawn(config):
        for rollouts in config.budgets(parameters):
            evaluation = config.evaluation_of(parameters, rollouts)
            resolve(EvaluationConfig.model_validate(evaluation.model_dump()))
            assert evaluation.num_rollouts == rollouts and evaluation.split == "val"
            assert evaluation.inverse_temperature == parameters["inverse_temperature"]
            (method,) = evaluation.method_configs()
            gamma = (
                parse_reward(evaluation.reward)
                .build(RewardContext(load_sine()))
                .multipliers["spectral"]
            )
            assert method.name == parameters["method"] and gamma == parameters["gamma"]


def test_methods_with_a_flow_stand_beside_the_same_ones_without():
    config = load_sweep(
        None,
        {
            "evaluation": {"flow": "bundled", "horizon": 48, "reward": "spectral:gamma=1"},
            "methods": ["snis", "snis+flow", "s_adt"],
            "space": {
                "inverse_temperature": {"low": 5, "high": 30},
                "alpha": [0.0, 0.5],
                "rollouts": [10, 20],
            },
        },
    )
    for method, alpha in (("snis", None), ("snis+flow", None), ("s_adt", 0.5)):
        parameters = {"method": method, "inverse_temperature": 20.0, "rollouts": 10}
        parameters |= {} if alpha is None else {"alpha": alpha}
        assert set(config.search_space.names_of(method)) == parameters.keys() - {"method"}
        evaluation = config.evaluation_of(parameters, 10)
        (one,) = evaluation.method_configs()
        assert (one.name, one.label) == (method.removesuffix("+flow"), method)
        assert one.uses_flow == (evaluation.flow is not None) == (method != "snis")
        assert (evaluation.flow_identity is not None) == (method != "snis")


def load_sine():
    import numpy as np

    return np.sin(np.arange(64.0))


def test_a_space_travels_as_a_pickle_and_screens_on_points_of_its_own():
    space = sweep().search_space
    assert pickle.loads(pickle.dumps(space)) == space
    assert space.grid("gamma", 5) == [0.5, 1, 2.0]
    grid = space.grid("inverse_temperature", 4)
    assert (
        grid[0] == 1.0
        and grid[-1] == 30.0
        and grid[1] / grid[0] == pytest.approx(grid[2] / grid[1], rel=1e-4)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"epsilonn": [0.1]}}, r"unknown parameter of the space 'epsilonn'\. Did you mean 'epsilon'"),
        ({"space": {"ess_threshold": [0.5]}}, r"space: ess_threshold, but none of the methods .* smc have"),
        ({"methods": ["snis"], "space": {"block_size": [4]}}, r"block_size, but none of the methods snis .*dts"),
        ({"methods": ["snis", "snis"]}, "methods: snis, snis, each"),
        ({"methods": ["sample"], "space": {"gamma": [1.0, 2.0]}}, "methods: sample is a reference line"),
        ({"methods": ["snisx"]}, "unknown method 'snisx'"),
        ({"methods": ["snis"], "space": {}}, "space: empty"),
        ({"methods": ["s_adt"], "space": {"alpha": [0.0, 0.5]}}, "s_adt needs a flow"),
        ({"methods": ["snis", "snis+flow"], "space": {}}, r"snis\+flow .*needs a flow"),
        ({"methods": ["snis"], "evaluation": {"flow": "bundled"}}, "flow: 'bundled', but none of the methods snis uses it"),
        ({"space": {"epsilon": {"low": 0.5, "high": 0.1}}}, "epsilon: low 0.5, must be below high 0.1"),
        ({"space": {"epsilon": {"low": 0, "high": 0.1, "log": True}}}, "epsilon: low 0, must be above 0 with log"),
        ({"space": {"epsilon": {"low": 0.1, "high": 1.5}}}, "residual_ts with epsilon=1.5: .*less than or equal to 1"),
        ({"space": {"expansion_k": [4, 0]}}, "maxent_ts with expansion_k=0: .*greater than or equal to 1"),
        ({"space": {"expansion_k": {"low": 0.5, "high": 4}}}, "expansion_k: 0.5 to 4.*whole numbers"),
        ({"space": {"tail": {"low": 0, "high": 1}}}, "space: tail has no range"),
        ({"space": {"epsilon": {"lo": 0, "high": 1}}}, "unknown option of space, epsilon 'lo'.*Did you mean 'low'"),
        ({"space": {"epsilon": 0.3}}, "space: epsilon: 0.3, allowed: a list of choices, or"),
        ({"space": {"epsilon": []}}, r"space: epsilon: \[\], allowed: choices"),
        ({"space": {"epsilon": [0.1, 0.1]}}, "choices that differ"),
        ({"space": {"num_samples": [8, 16]}}, "num_samples cannot be swept: metrics need the same number"),
        ({"space": {"inverse_temperature": [-1.0, 1.0]}}, "inverse_temperature=-1.0: .*greater than 0"),
        ({"space": {"gamma": [-1.0]}}, "gamma=-1.0: .*must be finite and >= 0"),
        ({"evaluation": {"reward": "nonneg"}}, "but reward 'nonneg' has no spectral term"),
        ({"evaluation": {"num_samples": 1}}, "num_samples: 1"),
        ({"evaluation": {"warm_start": "x"}}, "warm_start is no setting of a sweep"),
        ({"evaluation": {"horizn": 8}}, "unknown option of evaluation 'horizn'"),
        ({"rungs": [30, 10]}, r"rungs: \[30, 10\]"),
        ({"rungs": [10, 25, 90]}, "rungs: .*the same whole multiple"),
        ({"rungs": [10], "scheduler": "asha"}, "asha needs rungs, at least two"),
        ({"space": {"rollouts": [10, 20]}}, "rungs: given, but rollouts is swept"),
        ({"space": {"rollouts": [10], "max_nfe": [99]}, "rungs": None}, "both budgets"),
        ({"objectives": ["crps", "mase"], "scheduler": "asha"}, "scheduler: asha, but there are 2 objectives"),
        ({"objectives": ["crpss"]}, "unknown objective 'crpss'"),
        ({"objectives": ["reward"]}, "'reward', but gamma and inverse_temperature changes the scale"),
        ({"objectives": ["reward_mean"]}, "'reward_mean', but gamma"),
        ({"objectives": ["nfe"]}, "nfe alone"),
        ({"objectives": ["crps", "nfe"]}, "nfe, but every trial has the same budget"),
        ({"objectives": ["crps", "crps"]}, "each may be given once"),
        ({"num_trials": 0}, "num_trials: 0"),
        ({"trials": 3}, "unknown option of a sweep 'trials'.*num_trials"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_work_is_refused_with_the_reason(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        sweep(**changes)


def test_weights_and_biases_is_refused_where_it_is_not_installed():
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        sweep(wandb="project")


def test_asha_is_for_one_objective_and_growing_budgets_and_reward_for_fixed_rewards():
    assert sweep().asha
    assert not sweep(scheduler="none").asha
    assert not sweep(rungs=None).asha
    assert not sweep(objectives=["crps", "spec_w1_gap"]).asha
    assert sweep(objectives=["reward"], space={"epsilon": [0.1, 0.2]}).objectives == ["reward"]
    assert sweep(objectives=["crps", "nfe"], rungs=None, space={"rollouts": [10, 20]}).budgets(
        {"rollouts": 20}
    ) == [20]
    nfe = sweep(rungs=None, space={"max_nfe": [200, 400]}).evaluation_of(
        {"method": "snis", "max_nfe": 200}, 100
    )
    assert options_of(nfe, nfe.method_configs()[0])["num_rollouts"] is None


def test_validation_windows_of_a_series_without_splits_end_where_test_windows_begin():
    val, test = (load_problems("co2", horizon=24, split=split) for split in ("val", "test"))
    ends = [int(p.name.split("@")[1]) + 24 for p in val]
    starts = [int(p.name.split("@")[1]) for p in test]
    assert len(val) > 2 and max(ends) <= min(starts) and len(test) == len(val)
    with pytest.raises(DataError):
        load_problems("co2", horizon=400, split="val", context_length=512)


def test_a_problem_that_no_trial_could_search_is_refused_by_name(tmp_path):
    path = tmp_path / "flat.csv"
    path.write_text(
        "a,b\n" + "\n".join(f"{7 if i < 140 else i},{i % 7}" for i in range(200)) + "\n"
    )
    given = {"dataset": str(path), "context_length": 32, "horizon": 8, "num_problems": None}
    with pytest.raises(SdtError, match=r"problem a@\d+ cannot be searched: .*constant"):
        problems_of(sweep(evaluation=given | {"split": "val"}))
    assert len(problems_of(sweep(evaluation=given | {"channels": ["b"]}))) == 6


def line(config: SweepConfig, parameters: dict, crps: list[float], nfe: int = 24):
    rungs = [
        {"rollouts": r, "objectives": {"crps": interval(v), "nfe": interval(r * nfe)}}
        for r, v in zip(config.budgets(parameters), crps, strict=False)
    ]
    import json

    return line_of(parameters, {"rungs": json.dumps(rungs)}, config.budgets(parameters)[-1])


def interval(value: float) -> dict[str, float]:
    return {"mean": value, "low": value - 0.1, "high": value + 0.1}


def some_trials(config: SweepConfig) -> list:
    return [
        line(config, {"method": "snis", "inverse_temperature": 3.0, "gamma": 0.5}, [0.5, 0.4, 0.32]),
        line(config, {"method": "snis", "inverse_temperature": 9.0, "gamma": 1}, [0.1]),
        line(config, {"method": "residual_ts", "inverse_temperature": 5.0, "gamma": 2.0, "epsilon": 0.2}, [0.6, 0.35, 0.3]),
    ]  # fmt: skip


def test_the_best_trial_is_chosen_among_those_with_the_largest_budget(tmp_path):
    config = sweep()
    trials = some_trials(config)
    write_trials(tmp_path, [*trials, trials[0]])
    write_trials(tmp_path, trials[1:2])
    read = read_trials(tmp_path)
    assert [one.status for one in read] == ["finished", "stopped", "finished"] and read == trials
    best = best_trial(config, read)
    assert best == trials[2] and best.objectives["crps"]["mean"] == 0.3
    front = [p.means for p in points_of(config, read) if p.on_front]
    assert front == [{"crps": 0.1, "nfe": 240.0}]
    assert len(points_of(config, read)) == 7


def test_best_yaml_is_an_evaluation_and_heldout_yaml_sets_it_beside_the_defaults(tmp_path):
    config = sweep()
    best = best_trial(config, some_trials(config))
    write_choice(tmp_path, config, best)
    evaluation = load_config(str(tmp_path / BEST), {})
    assert evaluation == chosen_evaluation(config, best)
    assert (
        evaluation.split == "test"
        and evaluation.num_rollouts == 90
        and evaluation.reward == "spectral:gamma=2"
    )
    assert options_of(evaluation, evaluation.method_configs()[0])["epsilon"] == 0.2
    chosen, defaults = yaml.safe_load((tmp_path / HELDOUT).read_text())["methods"]
    assert chosen["label"] == "chosen" and chosen["name"] == "residual_ts"
    assert defaults["reward"] == "spectral:gamma=1" and defaults["options"] == {
        "inverse_temperature": 3.0
    }
    both = load_config(str(tmp_path / HELDOUT), {})
    assert [both.reward_of(method) for method in both.method_configs()] == [
        "spectral:gamma=2",
        "spectral:gamma=1",
    ]


def test_heldout_settings_of_the_same_reward_are_an_evaluation_already(tmp_path):
    config = sweep(space={"inverse_temperature": [1.0, 2.0]}, methods=["snis"])
    best = best_trial(
        config, [line(config, {"method": "snis", "inverse_temperature": 2.0}, [0.3, 0.3, 0.3])]
    )
    settings = heldout_settings(chosen_evaluation(config, best))
    settings = {name: value for name, value in settings.items() if value is not None}
    evaluation = load_config(None, settings)
    strengths = {
        m.label: options_of(evaluation, m)["inverse_temperature"]
        for m in evaluation.method_configs()
    }
    assert strengths == {"chosen": 2.0, "defaults": 3.0}


def test_importance_goes_to_the_parameter_that_decides_and_needs_some_trials():
    space = {"inverse_temperature": {"low": 1, "high": 30}, "gamma": {"low": 0.1, "high": 2}}
    config = sweep(space=space, methods=["snis"])
    trials = [
        line(
            config,
            {"method": "snis", "inverse_temperature": float(a), "gamma": float(b) / 10},
            [float(a)],
        )
        for a in range(1, 30, 4)
        for b in range(1, 20, 5)
    ]
    found = importances(config, trials)
    assert found["inverse_temperature"] > 0.9 and sum(found.values()) == pytest.approx(1.0)
    assert importances(config, trials[:4]) == {}


def test_the_spectral_gap_is_the_distance_of_means_to_the_truths():
    problems = load_problems("co2", horizon=24, num_problems=4)
    from sdt_dist.tune.objectives import truth_rows

    truth = truth_rows(problems)
    rows = {index: {"spec_w1": row["spec_w1"] + 0.01} for index, row in truth.items()}
    assert measure_rows(rows, problems, ["spec_w1_gap"])["spec_w1_gap"]["mean"] == pytest.approx(
        0.01
    )
    below = {index: {"spec_w1": row["spec_w1"] - 0.01} for index, row in truth.items()}
    assert measure_rows(below, problems, ["spec_w1_gap"])["spec_w1_gap"]["mean"] == pytest.approx(
        0.01
    )
    around = {
        i: {"spec_w1": row["spec_w1"] + d}
        for (i, row), d in zip(truth.items(), (-3, 1, 1, 2), strict=True)
    }
    found = measure_rows(around, problems, ["spec_w1_gap"])["spec_w1_gap"]
    assert (
        found["mean"] == pytest.approx(0.25)
        and found["low"] == 0.0
        and found["high"] == pytest.approx(2.0)
    )
    apart = {
        i: {"spec_w1": row["spec_w1"] - d}
        for (i, row), d in zip(truth.items(), (1, 2, 3, 4), strict=True)
    }
    found = measure_rows(apart, problems, ["spec_w1_gap"])["spec_w1_gap"]
    assert 1.0 < found["low"] < found["mean"] < found["high"] < 4.0


def test_a_space_of_too_many_corners_still_tries_every_end():
    domains = {
        name: Range(low=0.1, high=0.2) for name in ("epsilon", "gamma", "inverse_temperature")
    }
    space = Space(("residual_ts",), domains)
    tried = list(space.corners("residual_ts"))
    assert len(tried) == 8
