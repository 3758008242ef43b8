"""Evidence of evaluation runs: what their keys depend on, what is kept, and what a configuration may ask for."""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.evidence import (
    check_warm,
    evidence_keys,
    evidence_path,
    keep_evidence,
    load_evidence,
    model_identity,
)
from sdt_dist.evaluation.plan import Plan, plan_on, resolve
from sdt_dist.evaluation.run_evidence import RunEvidence
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import parse_reward, reward_identity
from sdt_dist.values.reweigh import reweigh
from tests.search_helpers import run_toy, toy
from tests.sharing_helpers import run_teams

BASE = {"methods": ["residual_ts"], "horizon": 8, "context_length": 64, "num_rollouts": 8}
PROBLEMS = [
    ForecastProblem(i, str(i), np.sin(np.arange(64.0) + i), np.zeros(8), 1, 0.0, 1.0)
    for i in range(2)
]


def keys(**changes) -> dict[int, str]:
    return evidence_keys(EvaluationConfig.model_validate(BASE | changes), PROBLEMS)


def test_keys_are_equal_for_runs_that_differ_in_what_only_weighs():
    assert keys() == keys(
        inverse_temperature=9.0,
        reward="2*spectral:gamma=3",
        num_rollouts=99,
        seed=4,
        wave_size=2,
        num_samples=7,
    )
    assert len(set(keys().values())) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"reward": "spectral:distance=kl"},
        {"reward": "spectral+nonneg"},
        {"horizon": 9},
        {"model": "a/b"},
    ],
)
def test_keys_differ_where_walks_do(change):
    assert set(keys().values()).isdisjoint(keys(**change).values())


@pytest.mark.parametrize(
    ("one", "other"),
    [("spectral:gamma=1+nonneg", "0.5*spectral:gamma=7+3*nonneg"), ("bounds:low=0", "2*bounds:low=0"), ("length:target=5", "length:target=5")],
)  # fmt: skip
def test_rewards_of_one_identity_have_the_same_terms(one, other):
    assert reward_identity(one) == reward_identity(other)
    context = RewardContext(history=np.sin(np.arange(64.0)))
    ours, theirs = (parse_reward(spec).build(context).multipliers for spec in (one, other))
    assert ours.keys() == theirs.keys()


def test_rewards_that_score_differently_have_their_own_identity(tmp_path):
    specs = ["spectral", "nonneg", "spectral+nonneg", "nonneg+spectral", "bounds:low=0", "bounds:low=1", "regex:a", "regex:b"]  # fmt: skip
    assert len({reward_identity(spec) for spec in specs}) == len(specs)
    path = tmp_path / "own.py"
    path.write_text("def score(samples): return [0.0] * len(samples)\n")
    before = reward_identity(f"{path}:score")
    path.write_text("def score(samples): return [1.0] * len(samples)\n")
    assert reward_identity(f"{path}:score") != before


def test_a_models_identity_is_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = model_identity(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert model_identity(str(tmp_path)) != before
    assert model_identity("bundled") == model_identity("hf:bundled")
    assert model_identity("owner/name") == "hf:owner/name"


def test_a_run_keeps_its_evidence_and_reads_it_again(tmp_path):
    alone = run_toy("A", "residual_ts", 0, num_rollouts=30)
    team = run_teams("A", 30, 3)[0]
    for label, result in [("a b", alone), ("team", team)]:
        keep_evidence(tmp_path, label, 0, "key", result.snapshot, "run")
    assert evidence_path(tmp_path, "a b", 0).is_file()
    store = load_evidence(tmp_path)
    assert store.held("key") == {"run/a b/0/0/0": 30, "r/0/0/0": 10, "r/0/1/0": 10, "r/0/2/0": 10}
    found = reweigh(store.walks("key"), {"toy": 1.0}, 5.0)
    assert abs(found.log_z - toy("A").log_z) < 4 * found.log_z_error
    check_warm(store, {0: "key", 1: "none"}, tmp_path)
    with pytest.raises(ConfigurationError, match="none of these 1 problems"):
        check_warm(store, {1: "none"}, tmp_path)
    evidence_path(tmp_path, "team", 0).write_text("torn")
    with pytest.raises(CheckpointError):
        load_evidence(tmp_path)


def _own_rewards(tmp_path, *rewards: str | None, **changes) -> tuple[Plan, RunEvidence]:
    methods = [
        {"name": "residual_ts", "label": str(i), "reward": reward}
        for i, reward in enumerate(rewards)
    ]
    config = EvaluationConfig.model_validate(BASE | changes | {"methods": [*methods, "snis"]})
    plan = plan_on(config, PROBLEMS)
    return plan, RunEvidence(plan, tmp_path)


def test_a_methods_evidence_is_that_of_its_own_reward(tmp_path):
    """Another gamma weighs the same walks, other terms make other walks."""
    rewards = (None, "spectral:gamma=7", "nonneg")
    plan, have = _own_rewards(tmp_path, *rewards, searchers_per_problem=2)
    one, other, third = (have.sharing(method) for method in plan.methods if method.has_walks)
    assert one.keys == other.keys == keys() and third.keys == keys(reward="nonneg")
    assert len({one.run, other.run, third.run}) == 3


def test_a_warm_start_must_have_evidence_of_every_methods_reward(tmp_path):
    walks = run_toy("A", "residual_ts", 0, num_rollouts=5).snapshot
    keep_evidence(tmp_path, "m", 0, keys()[0], walks, "run")
    plan, have = _own_rewards(tmp_path, None, "spectral:gamma=7", warm_start=str(tmp_path))
    for method in plan.methods[:2]:
        assert len(have.sharing(method).members(0)[0].warm) == 5
    with pytest.raises(ConfigurationError, match=r"none of these 2 problems.*reward terms"):
        _own_rewards(tmp_path, None, "nonneg", warm_start=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"searchers_per_problem": 2, "methods": ["residual_ts", "dts"]},
            "searchers_per_problem: 2.*'dts'.*residual_ts",
        ),
        ({"searchers_per_problem": 9}, "searchers_per_problem: 9.*num_rollouts = 8"),
        ({"warm_start": "nowhere"}, "warm_start: nowhere.*keep_evidence"),
        ({"warm_start": "nowhere", "methods": ["snis"]}, "warm_start.*'snis'"),
        ({"keep_evidence": True, "methods": ["snis"]}, "keep_evidence.*snis.*residual_ts"),
    ],
)
def test_configurations_that_cannot_share_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve(EvaluationConfig.model_validate(BASE | change))


def test_configurations_that_can_share_are_not():
    teams = EvaluationConfig.model_validate(
        BASE | {"searchers_per_problem": 2, "keep_evidence": True}
    )
    alone = EvaluationConfig.model_validate({"keep_evidence": True})
    for config in (teams, alone):
        resolve(config)
    assert teams.shares_evidence and not alone.shares_evidence
