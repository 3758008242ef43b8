"""Trajectories from saved searches, rows of p for them, their files, and the replay buffer.

See docs/concepts/flow.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdt_dist.errors import CheckpointError, ConfigurationError, DataError
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import Root
from sdt_dist.training.flow.batch import make_batch
from sdt_dist.training.flow.extract import stratified, trajectories_of, with_rows
from sdt_dist.training.flow.replay import ReplayBuffer
from sdt_dist.training.flow.trajectories import Trajectory, load_trajectories, save_trajectories
from sdt_dist.tree.snapshot import Snapshot
from tests.flow_helpers import toy_trajectory
from tests.search_helpers import run_toy, toy


def searched(
    name: str = "A", method: str = "residual_ts", **options
) -> tuple[Toy, TokenProcess, Root, Snapshot]:
    model = toy(name)
    process = TokenProcess(model, model.law, model.length)
    result = run_toy(name, method, 3, **{"num_rollouts": 40, **options})
    assert result.snapshot is not None
    return model, process, process.root([0]), result.snapshot


def same(one: Trajectory, other: Trajectory) -> bool:
    """Equality of all fields, NaN being equal to itself."""
    pairs = [(getattr(one, n), getattr(other, n)) for n in ("prompt", "tokens", "log_prob")]
    columns = ("tokens", "log_prob", "log_weight", "reward", "ends")
    pairs += [(getattr(one.candidates, n), getattr(other.candidates, n)) for n in columns]
    facts = [
        (t.context, t.reward, t.log_omega, t.soft_values_at, t.source, t.soft_values is None)
        for t in (one, other)
    ]
    if one.soft_values is not None and other.soft_values is not None:
        pairs.append((one.soft_values, other.soft_values))
    return facts[0] == facts[1] and all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("method", ["residual_ts", "dts", "maxent_ts"])
def test_trajectories_hold_what_the_tree_knows(method: str) -> None:
    model, _, root, snapshot = searched(method=method)
    trajectories = trajectories_of(snapshot, root)
    assert {tuple(t.tokens.tolist()) for t in trajectories} == set(snapshot.sequences)
    for t in trajectories:
        tokens = tuple(t.tokens.tolist())
        assert t.reward == model.rewards[model.index(tokens)]
        assert t.log_prob.sum() == pytest.approx(model.log_prior[model.index(tokens)])
        assert t.context == root.digest.hex() and t.source == {
            "method": method,
            "seed": 3,
            "problem": 0,
        }
        for step in range(4):
            place = t.candidates.step(step)
            row = model.log_prob_tables[step][model.index(tokens[:step])]
            np.testing.assert_allclose(
                t.candidates.log_prob[place], row[t.candidates.tokens[place]], atol=1e-12
            )
            assert np.exp(t.candidates.log_weight[place]).sum() == pytest.approx(1)
        last = t.candidates.step(3)
        rewards = dict(
            zip(t.candidates.tokens[last].tolist(), t.candidates.reward[last].tolist(), strict=True)
        )
        for token, reward in rewards.items():
            sequence = (*tokens[:3], token)
            known = sequence in snapshot.sequences
            assert reward == model.rewards[model.index(sequence)] if known else np.isnan(reward)
    if method == "residual_ts":
        found, log_omega = (snapshot.notes[name].tolist() for name in ("sample", "log_omega"))
        assert [t.log_omega for t in trajectories] == [
            log_omega[found.index(i)] for i in range(len(trajectories))
        ]


def test_an_exhausted_tree_gives_complete_rows() -> None:
    _, _, root, snapshot = searched(num_rollouts=700)
    for t in trajectories_of(snapshot, root):
        np.testing.assert_allclose(t.candidates.log_weight, t.candidates.log_prob, atol=1e-12)
        assert (np.diff(t.candidates.ends, prepend=0) == 5).all()


def test_blocks_and_other_prompts_are_refused() -> None:
    _, _, root, snapshot = searched()
    with pytest.raises(ConfigurationError, match="blocks"):
        trajectories_of(replace(snapshot, blocks=[(1, 2)]), root)
    with pytest.raises(ConfigurationError, match="prompt"):
        trajectories_of(snapshot, replace(root, digest=b"x"))


def test_complete_rows_are_those_of_the_model() -> None:
    model, process, root, snapshot = searched("D", num_rollouts=20)
    before = model.nfe
    trajectories = with_rows(process, root, trajectories_of(snapshot, root))
    states = {t.key[1][:i] for t in trajectories for i in range(3)}
    assert model.nfe - before <= len(states)  # each distinct state once
    rewards = {t.key[1]: t.reward for t in trajectories}
    for t in trajectories:
        tokens = t.key[1]
        found = t.candidates
        for step in range(3):
            place = found.step(step)
            order = np.argsort(found.tokens[place])
            row = model.log_prob_tables[step][model.index(tokens[:step])]
            assert (found.tokens[place][order] == np.arange(30)).all()
            np.testing.assert_allclose(found.log_prob[place][order], row, atol=1e-12)
            known = [rewards.get((*tokens[:step], token), np.nan) for token in range(30)]
            np.testing.assert_array_equal(found.reward[place][order], known)
        assert (found.log_weight == found.log_prob).all()


def test_rows_by_draws_without_replacement_are_unbiased() -> None:
    """Sums of the weights over many seeds are 1 in the mean, and the trajectory's own token is always there."""
    _, process, root, snapshot = searched("D", num_rollouts=5)
    plain = trajectories_of(snapshot, root)
    sums = []
    for seed in range(300):
        for t in with_rows(process, root, plain, num_children=6, seed=seed):
            sizes = np.diff(t.candidates.ends, prepend=0)
            assert set(sizes.tolist()) <= {6, 7}
            sums.append(
                [np.exp(t.candidates.log_weight[t.candidates.step(i)]).sum() for i in range(3)]
            )
    mean = np.mean(sums, axis=0)
    error = np.std(sums, axis=0) / np.sqrt(300)
    assert (np.abs(mean - 1) < 4 * error).all() and (error < 0.05).all()


def test_files_bring_back_the_same_trajectories(tmp_path: Path) -> None:
    _, _, root, snapshot = searched()
    trajectories = [*trajectories_of(snapshot, root), toy_trajectory(toy("A"), (1, 2, 3, 4))]
    save_trajectories(tmp_path / "t.npz", trajectories)
    loaded = load_trajectories(tmp_path / "t.npz")
    assert len(loaded) == len(trajectories) and all(map(same, loaded, trajectories))


def test_damaged_trajectory_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    save_trajectories(path, [toy_trajectory(toy("A"), (1, 2, 3, 4))])
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match="trajectories"):
            load_trajectories(path)
    np.savez(path, head=np.array("{}"))
    with pytest.raises(CheckpointError, match="format None"):
        load_trajectories(path)
    with pytest.raises(CheckpointError, match="holds none"):
        load_trajectories(tmp_path / "missing.npz")


def test_malformed_trajectories_are_refused() -> None:
    good = toy_trajectory(toy("A"), (1, 2, 3, 4))
    with pytest.raises(DataError, match="reward nan"):
        replace(good, reward=float("nan"))
    with pytest.raises(DataError, match="none of that step's candidates"):
        replace(good, tokens=np.array([1, 2, 3, 9]))
    with pytest.raises(DataError, match="log-probabilities"):
        replace(good, log_prob=good.log_prob[:2])
    tilts = {good.context: 1.0}
    with pytest.raises(DataError, match="max_new_tokens"):
        make_batch([good], tilts, FlowSpec(5, (0, 5), 3))
    with pytest.raises(DataError, match="allowed range"):
        make_batch([good], tilts, FlowSpec(5, (0, 4), 4))


def toy_buffer(capacity: int = 100, exponent: float = 0.5) -> ReplayBuffer:
    replay = ReplayBuffer(capacity, exponent)
    for prompt in range(4):
        replay.add(
            [toy_trajectory(toy("A"), toy("A").sequence(i), (prompt,)) for i in range(0, 60, 7)]
        )
    return replay


def test_replay_is_bounded_and_distinct() -> None:
    replay = toy_buffer(capacity=20)
    assert (len(replay), replay.added, replay.evicted) == (20, 36, 16)
    newest = toy_trajectory(toy("A"), toy("A").sequence(0), (3,))
    kept = replay.trajectories
    assert replay.add([replace(newest, reward=0.5)]) == 0 and len(replay) == 20
    assert replay.trajectories[-1].reward == 0.5
    assert [t.key for t in replay.trajectories[:-1]] == [t.key for t in kept if t.key != newest.key]


def test_replay_samples_contexts_and_distinct_trajectories() -> None:
    replay = toy_buffer()
    drawn = replay.sample(np.random.default_rng(0), 3, 5)
    assert len({t.key for t in drawn}) == len(drawn) == 15 and len({t.context for t in drawn}) == 3
    assert len(replay.sample(np.random.default_rng(0), 9, 99)) == 36
    again = replay.sample(np.random.default_rng(0), 3, 5)
    assert [t.key for t in again] == [t.key for t in drawn]


def test_replay_prefers_large_losses() -> None:
    replay = toy_buffer(exponent=1.0)
    everything = replay.trajectories
    losses = np.zeros(36)
    losses[5] = 50.0
    replay.update(everything, losses.tolist())
    hits = sum(
        replay.sample(np.random.default_rng(i), 1, 1)[0].key == everything[5].key
        for i in range(200)
    )
    assert hits > 190
    fresh = toy_trajectory(toy("A"), toy("A").sequence(600), (0,))
    replay.update(everything, np.zeros(36).tolist())
    replay.add([fresh])
    hits = sum(
        replay.sample(np.random.default_rng(i), 1, 1)[0].key == fresh.key for i in range(200)
    )
    assert hits > 190  # what nobody has looked at comes first


def test_replay_is_restored_exactly() -> None:
    replay = toy_buffer(capacity=20)
    replay.update(replay.trajectories, np.random.default_rng(0).random(20).tolist())
    replay.add([replay.trajectories[3]])
    restored = ReplayBuffer.restore(*replay.state())
    more = [toy_trajectory(toy("A"), toy("A").sequence(i), (i % 5,)) for i in range(200, 210)]
    for seed in range(4):
        draws = [r.sample(np.random.default_rng(seed), 3, 4) for r in (replay, restored)]
        assert all(map(same, *draws)) and draws[0]
        for r in (replay, restored):
            r.add(more[seed * 2 : seed * 2 + 2])
    assert (restored.added, restored.evicted) == (replay.added, replay.evicted)
    head, arrays = replay.state()
    with pytest.raises(CheckpointError, match="damaged"):
        ReplayBuffer.restore(head, {**arrays, "losses": arrays["losses"][:-1]})


def test_replay_refuses_what_cannot_work() -> None:
    with pytest.raises(ConfigurationError, match="capacity 0"):
        ReplayBuffer(0)
    with pytest.raises(ConfigurationError, match="empty"):
        ReplayBuffer(5).sample(np.random.default_rng(0), 1, 1)


def test_strata_stand_for_a_whole_row() -> None:
    """Their weights sum to 1, and any function's weighted sum has its expectation; its spread is far below that of draws."""
    tokens = np.arange(2, 1024)
    for centre, spread, count in ((400.3, 40.0, 24), (7.0, 30.0, 40), (500.2, 0.6, 24)):
        log_prob = -0.5 * ((tokens - centre) / spread) ** 2
        log_prob -= np.logaddexp.reduce(log_prob)
        prob = np.exp(log_prob)
        row = (tokens[::-1], log_prob[::-1], log_prob[::-1])
        for f in (
            (tokens - centre) / spread,
            np.cos(tokens * 2.0),
        ):  # smooth, and as rough as can be
            sums = []
            for key in range(400):
                kept, own, log_weight = stratified(row, count, key)
                assert len(kept) <= count and (np.diff(kept) > 0).all()
                assert np.exp(log_weight).sum() == pytest.approx(1, abs=1e-12)
                np.testing.assert_array_equal(own, log_prob[kept - 2])
                sums.append(np.exp(log_weight) @ f[kept - 2])
            error = max(np.std(sums) / 20, 1e-9)
            assert abs(np.mean(sums) - prob @ f) < 4 * error
        assert (
            np.std(
                [
                    np.exp(w) @ ((k - centre) / spread)
                    for k, _, w in (stratified(row, count, i) for i in range(50))
                ]
            )
            < 0.05
        )
