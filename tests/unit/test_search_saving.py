"""Saved searches: resuming with more budget equals never having stopped; further draws cost nothing."""

from __future__ import annotations

import numpy as np
import pytest

import sdt_dist as sdt
from sdt_dist.errors import CheckpointError, ConfigurationError, SdtError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.search.api import run_searches
from sdt_dist.search.session import SearchProblem
from sdt_dist.tree.snapshot import Snapshot
from tests.search_helpers import PARAMETERS, law_of, run_toy, toy

TREES = {"residual_ts": {}, "dts": {}, "dts_star": {}, "maxent_ts": {"expansion_k": 3}, "mcts": {}}
BLOCKS = {"dts": {"block_size": 2}, "maxent_ts": {"branch_depths": [1, 4], "expansion_k": 3}}
CASES = [*TREES.items(), *BLOCKS.items()]


def resumed(method: str, saved: Snapshot, **options):
    model = Toy(*PARAMETERS["C"])
    process = TokenProcess(model, model.law, model.length)
    problem = SearchProblem(0, process.root([0]), model)
    options = {"inverse_temperature": model.inverse_temperature, "wave_size": 4} | options
    runs = run_searches(process, [problem], method=method, options=options, seed=3, resume=saved)
    return next(iter(runs))[1]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_resuming_from_disk_equals_never_having_stopped(method, options, tmp_path):
    whole = run_toy("C", method, 3, num_rollouts=48, wave_size=4, **options)
    half = run_toy("C", method, 3, num_rollouts=20, wave_size=4, **options)
    path = half.snapshot.save(tmp_path / "search.npz")
    result = resumed(method, Snapshot.load(path), num_rollouts=48, **options)
    assert result.samples == whole.samples
    assert result.finished == whole.finished
    assert (result.log_z, result.log_z_error, result.ess) == (
        whole.log_z,
        whole.log_z_error,
        whole.ess,
    )
    assert (result.rollouts, result.cost.reward_calls) == (48, whole.cost.reward_calls)
    assert half.nfe < result.nfe
    for name, values in whole.tree.arrays().items():
        np.testing.assert_array_equal(result.tree.arrays()[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "dts"}, "method"),
        ({"epsilon": 0.5}, "epsilon"),
        ({"inverse_temperature": 2.0}, "inverse_temperature"),
    ],
)
def test_resuming_refuses_another_search(change, word, tmp_path):
    saved = run_toy("C", "residual_ts", 3, num_rollouts=8, wave_size=4).snapshot
    with pytest.raises(ConfigurationError, match=word):
        resumed(change.pop("method", "residual_ts"), saved, num_rollouts=16, **change)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("not a search")
    np.savez(tmp_path / "other.npz", head=np.array('{"format": "other/1"}'))
    np.savez(tmp_path / "pickle.npz", head=np.array([{}], dtype=object), allow_pickle=True)
    for name in ("text.npz", "other.npz", "pickle.npz", "missing.npz"):
        with pytest.raises(CheckpointError):
            Snapshot.load(tmp_path / name)


class Counter:
    """A language model over six tokens that counts its calls."""

    vocab_size = 6
    eos_token_id = 2

    def __init__(self) -> None:
        self.calls = 0

    def get_next_token_logits(self, token_sequence):
        self.calls += 1
        return np.random.default_rng(list(token_sequence)).standard_normal(6)


def fours(samples):
    return [float(tokens.count(4)) for tokens in samples]


def test_search_takes_a_path_to_resume_from(tmp_path):
    options = {"method": "residual_ts", "max_new_tokens": 5, "wave_size": 2, "seed": 1}
    first = sdt.search(Counter(), [5, 1], fours, num_rollouts=6, **options)
    path = first.snapshot.save(tmp_path / "s.npz")
    on = sdt.search(Counter(), [5, 1], fours, num_rollouts=12, resume=path, **options)
    assert on.samples == sdt.search(Counter(), [5, 1], fours, num_rollouts=12, **options).samples
    with pytest.raises(ConfigurationError, match="prompt"):
        sdt.search(Counter(), [5, 3], fours, num_rollouts=12, resume=path, **options)


def test_further_samples_cost_no_model_call_and_follow_the_distribution():
    model = Counter()
    result = sdt.search(
        model, [5, 1], fours, method="residual_ts", max_new_tokens=4, num_rollouts=30, seed=1
    )
    calls = model.calls
    drawn = result.draw(10_000, seed=4)
    assert model.calls == calls
    law: dict = {}
    for tokens, probability in result.distribution():
        law[tokens] = law.get(tokens, 0.0) + probability
    for tokens, probability in law.items():
        assert abs(sum(s.tokens == tokens for s in drawn) - 10_000 * probability) <= 2
    best = sdt.search(
        Counter(), [5, 1], fours, method="best_of_n", max_new_tokens=4, num_rollouts=30
    )
    with pytest.raises(SdtError, match="best_of_n"):
        best.draw(3)


def test_blocks_of_one_token_are_the_token_tree():
    tokens = run_toy("C", "dts", 5, num_rollouts=60, wave_size=4, weights="multiset")
    blocks = run_toy("C", "dts", 5, num_rollouts=60, wave_size=4, block_size=1)
    assert blocks.samples == tokens.samples
    assert blocks.nfe == tokens.nfe
    assert blocks.log_z == pytest.approx(tokens.log_z, abs=1e-12)


def test_one_block_for_everything_is_self_normalised_importance_sampling():
    model = toy("C")
    result = run_toy("C", "dts", 5, num_rollouts=60, block_size=model.length, growth=100.0)
    rewards = np.array([s.reward for s in result.finished])
    assert result.tree_stats["depth_max"] == 1
    counts = np.array([result.tree.nodes["multiplicity"][c] for c in result.tree.children(0)])
    weights = counts * np.exp(model.inverse_temperature * rewards)
    np.testing.assert_allclose(result.probabilities, weights / weights.sum(), atol=1e-12)
    assert result.log_z == pytest.approx(np.log(weights.sum() / 60), abs=1e-12)


@pytest.mark.parametrize(("method", "options"), BLOCKS.items())
def test_block_trees_branch_at_block_ends_only_and_converge(method, options):
    model = toy("C")
    result = run_toy("C", method, 0, num_rollouts=400, **options)
    assert result.tree_stats["depth_max"] == 3
    assert all(len(s.tokens) == model.length for s in result.finished)
    assert all(
        s.log_prob == pytest.approx(model.log_prior[model.index(s.tokens)], abs=1e-9)
        for s in result.finished
    )
    assert result.log_z == pytest.approx(model.log_z, abs=1.0)


def test_truncation_needs_one_definition_of_p():
    """tail="truncate" with top_k = k everywhere has the exact target of the truncated prior."""
    prompt = [5, 1]
    options = {"method": "maxent_ts", "max_new_tokens": 3, "expansion_k": 2, "tail": "truncate"}
    with pytest.raises(ConfigurationError, match="top_k=2"):
        sdt.search(Counter(), prompt, fours, num_rollouts=8, **options)
    result = sdt.search(Counter(), prompt, fours, num_rollouts=100, top_k=2, **options)
    exact = sdt.search(
        Counter(), prompt, fours, num_rollouts=100, top_k=2, method="residual_ts", max_new_tokens=3
    )
    assert result.exhausted and exact.exhausted
    assert len(result.finished) <= 8
    assert result.log_z == pytest.approx(exact.log_z, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"block_size": 0}, {"block_size": 2, "branch_depths": [1]}, {"branch_depths": [-1]},
     {"block_size": 2, "weights": "horvitz_thompson"}],
)  # fmt: skip
def test_contradictory_block_options_are_refused(options):
    with pytest.raises(ConfigurationError):
        run_toy("C", "dts", 0, num_rollouts=4, **options)


def test_smc_states_its_error():
    """Z-scores of log Z over many seeds have about unit spread: systematic resampling only makes them smaller."""
    model = toy("D")
    process = TokenProcess(model, model.law, model.length)
    problems = [SearchProblem(i, process.root([0]), model) for i in range(300)]
    options = {"num_rollouts": 200, "inverse_temperature": model.inverse_temperature}
    runs = [r for _, r in run_searches(process, problems, method="smc", options=options, seed=5)]
    scores = np.array([np.expm1(run.log_z - model.log_z) / run.log_z_error for run in runs])
    assert 0.7 < scores.std() < 1.3


def test_the_law_of_a_resumed_search_is_its_distribution(tmp_path):
    saved = run_toy("C", "residual_ts", 3, num_rollouts=8, wave_size=4).snapshot
    result = resumed("residual_ts", saved, num_rollouts=40)
    assert law_of(result, toy("C")).sum() == pytest.approx(1.0, abs=1e-9)
