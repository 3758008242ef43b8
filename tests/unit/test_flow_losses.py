"""The flow's losses: zero at the exact soft values of a toy, and not elsewhere.

See docs/concepts/flow.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sdt_dist.noise import gumbel
from sdt_dist.training.flow.batch import Batch, Scores, make_batch
from sdt_dist.training.flow.held_out import divergences_of
from sdt_dist.training.flow.losses import (
    bellman,
    contrastive,
    log_partition_variance,
    log_ratios,
    relative_trajectory_balance,
    subtrajectory_balance,
    terminal,
    tie,
)
from sdt_dist.training.flow.trajectories import Candidates, horvitz_thompson_log_weights
from tests.flow_helpers import exact_value, scores_by, shortened, toy_trajectory
from tests.search_helpers import toy

LOSSES = {
    "rtb": relative_trajectory_balance,
    "log_partition_variance": log_partition_variance,
    "subtb": lambda scores, batch: subtrajectory_balance(scores, batch, 0.9),
    "bellman": bellman,
    "terminal": terminal,
    "tie": tie,
}
TOY = toy("A")


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Six sequences of toy A."""
    rng = np.random.default_rng(0)
    trajectories = [toy_trajectory(TOY, TOY.sequence(int(i))) for i in rng.integers(0, 625, 6)]
    return make_batch(trajectories, {t.context: TOY.inverse_temperature for t in trajectories})


@pytest.fixture(scope="module")
def exact(batch: Batch) -> Scores:
    return scores_by(exact_value(TOY), batch)


def test_a_batch_has_the_candidates_of_every_step_and_pads_the_rest() -> None:
    """For trajectories of several lengths, one of which has two candidates at its second step."""
    short = shortened(toy_trajectory(TOY, (1, 2, 3, 4)), 2)
    long = toy_trajectory(TOY, (4, 3, 2, 1))
    found = long.candidates
    kept = [[t for t in range(5) if step != 1 or t in (0, 3)] for step in range(4)]
    steps = [
        tuple(column[found.step(t)][of] for column in _columns(found)) for t, of in enumerate(kept)
    ]
    narrow = replace(long, candidates=Candidates.join(steps))
    batch = make_batch([short, long, narrow], {long.context: 5.0})
    for i, trajectory in enumerate([short, long, narrow]):
        found = trajectory.candidates
        for t in range(4):
            own = found.step(t) if t < len(trajectory.tokens) else slice(0, 0)
            count = own.stop - own.start
            assert batch.candidates[i, t, :count].tolist() == found.tokens[own].tolist()
            assert (
                batch.candidate_log_weight[i, t, :count].tolist() == found.log_weight[own].tolist()
            )
            np.testing.assert_array_equal(batch.candidate_reward[i, t, :count], found.reward[own])
            assert (batch.candidate_log_weight[i, t, count:] == -np.inf).all()
            assert batch.candidate_reward[i, t, count:].isnan().all()
            if count:
                assert (
                    batch.candidates[i, t, batch.chosen[i, t]]
                    == batch.tokens[i, t]
                    == trajectory.tokens[t]
                )


def _columns(found: Candidates) -> tuple[np.ndarray, ...]:
    return found.tokens, found.log_prob, found.log_weight, found.reward


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_the_exact_values(name: str, batch: Batch, exact: Scores) -> None:
    assert LOSSES[name](exact, batch).abs().max() < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_not_zero_for_another_function(name: str, batch: Batch) -> None:
    def wrong(tokens: tuple[int, ...]) -> float:
        return exact_value(TOY)(tokens) + 0.1 * np.sin(1.0 + TOY.index(tokens) + 7 * len(tokens))

    scores = scores_by(wrong, batch)
    scores = replace(scores, state=scores.state + 0.05)  # `tie` compares the heads
    assert LOSSES[name](scores, batch).max() > 1e-3


def test_trajectories_of_other_lengths_do_not_matter(batch: Batch) -> None:
    """A short trajectory has the loss in a padded batch that it has alone."""
    short = shortened(toy_trajectory(TOY, (1, 2, 3, 4)), 2)
    long = toy_trajectory(TOY, (4, 3, 2, 1))
    tilts = {long.context: 5.0}

    def value(tokens: tuple[int, ...]) -> float:
        return float(np.cos(TOY.index(tokens) + len(tokens)))

    both = make_batch([long, short], tilts)
    alone = make_batch([short], tilts)
    for name in set(LOSSES) - {
        "log_partition_variance"
    }:  # which compares trajectories with each other
        have = LOSSES[name](scores_by(value, both), both)[1]
        assert have == pytest.approx(
            float(LOSSES[name](scores_by(value, alone), alone)[0]), rel=1e-12
        )


def test_trajectory_losses_see_children_up_to_a_constant(batch: Batch, exact: Scores) -> None:
    shifted = replace(exact, candidates=exact.candidates + torch.arange(1.0, 5.0)[:, None])
    assert relative_trajectory_balance(shifted, batch).max() < 1e-6
    assert log_partition_variance(shifted, batch).max() < 1e-6
    for name in ("bellman", "terminal", "tie"):
        assert LOSSES[name](shifted, batch).max() > 0.1


def test_log_z_of_the_exact_values(batch: Batch, exact: Scores) -> None:
    log_z = batch.tilt * batch.reward - log_ratios(exact, batch).sum(1)
    assert torch.allclose(log_z, torch.full_like(log_z, 3.157463), atol=1e-6)


def test_the_formula_of_the_early_notes_is_not_zero(batch: Batch, exact: Scores) -> None:
    """log Z + sum log[F(x_t-1)/P_F(x_t|x_t-1)] - lambda r, which docs/concepts/flow.md warns of."""
    log_p = torch.stack(
        [batch.candidate_log_weight[b, torch.arange(4), batch.chosen[b]] for b in range(6)]
    )
    log_pf = log_ratios(exact, batch) + log_p
    early = 5 * exact.state[:, 0] + (5 * exact.state[:, :-1] - log_pf).sum(1) - 5 * batch.reward
    assert early.abs().min() > 1


def test_losses_have_finite_gradients(batch: Batch, exact: Scores) -> None:
    state, candidates = (x.clone().requires_grad_() for x in (exact.state + 0.1, exact.candidates))
    sum(loss(Scores(state, candidates), batch).sum() for loss in LOSSES.values()).backward()
    assert state.grad is not None and state.grad.isfinite().all()
    assert candidates.grad is not None and candidates.grad.isfinite().all()


def test_horvitz_thompson_weights_are_unbiased() -> None:
    rng = np.random.default_rng(1)
    log_prob = rng.normal(size=12) * 1.5
    log_prob -= np.logaddexp.reduce(log_prob)
    values = rng.normal(size=12)
    keys = np.arange(40_000, dtype=np.uint64) * np.uint64(2**40 + 3)
    count = 4
    perturbed = log_prob + gumbel(keys, 12)
    order = np.argsort(-perturbed, axis=1)
    estimates = []
    for row, kept in zip(perturbed, order, strict=True):
        log_weight = horvitz_thompson_log_weights(log_prob[kept[:count]], float(row[kept[count]]))
        estimates.append(
            [(np.exp(log_weight) * values[kept[:count]]).sum(), np.exp(log_weight).sum()]
        )
    mean = np.mean(estimates, axis=0)
    error = np.std(estimates, axis=0) / np.sqrt(len(keys))
    wanted = np.array([(np.exp(log_prob) * values).sum(), 1.0])
    assert (np.abs(mean - wanted) < 4 * error).all() and (error < 0.01).all()


def test_complete_rows_weigh_as_the_prior() -> None:
    log_prob = np.log([0.5, 0.3, 0.2])
    assert (horvitz_thompson_log_weights(log_prob, -np.inf) == log_prob).all()


def test_contrastive_differences_are_divergences_from_the_target() -> None:
    """On draws from p, contrastive(F) - contrastive(V) estimates KL(pi* || P_F), so V is its minimum."""
    model = toy("U")
    rng = np.random.default_rng(1)
    count = 4_000
    sequences = [model.sequence(i) for i in range(27)]
    log_prior = np.array([toy_trajectory(model, s).log_prob.sum() for s in sequences])
    draws = rng.choice(27, count, p=np.exp(log_prior))
    trajectories = [toy_trajectory(model, s) for s in sequences]
    tilts = {t.context: model.inverse_temperature for t in trajectories}
    batch = make_batch([trajectories[i] for i in draws], tilts)
    log_target = (
        log_prior
        + model.inverse_temperature * np.array([t.reward for t in trajectories])
        - model.log_z
    )

    def wrong(tokens: tuple[int, ...]) -> float:
        return exact_value(model)(tokens) + 0.3 * np.sin(
            1.0 + model.index(tokens) + 7 * len(tokens)
        )

    every = make_batch(trajectories, tilts)
    of_f = log_prior + log_ratios(scores_by(wrong, every), every).sum(1).numpy()
    divergence = float(np.exp(log_target) @ (log_target - of_f))
    of_draws = [
        Scores(scores.state[draws], scores.candidates[draws])
        for scores in (scores_by(wrong, every), scores_by(exact_value(model), every))
    ]
    ours = contrastive(of_draws[0], batch) - contrastive(of_draws[1], batch)
    error = float(ours.std()) / count**0.5
    assert divergence > 10 * error and abs(float(ours.mean()) - divergence) < 3 * error

    (flow, prior), (of_exact, same_prior) = (divergences_of(scores, batch) for scores in of_draws)
    log_z = torch.logsumexp(batch.tilt * batch.reward, 0) - np.log(count)
    # 0 but for the error of log Z
    torch.testing.assert_close(of_exact, (model.log_z - log_z)[None])
    torch.testing.assert_close(flow - of_exact, ours.mean()[None])
    true_prior = float(np.exp(log_target) @ (log_target - log_prior))
    assert torch.equal(prior, same_prior) and abs(float(prior) - true_prior) < 0.1 * true_prior


def test_weights_within_a_context_correct_for_the_law_that_drew() -> None:
    """omega e^(lambda r), 1 where drawn from p, 0 where a flow drew it and its law is not known."""
    first, second = (toy_trajectory(TOY, TOY.sequence(i)) for i in (3, 77))
    other = toy_trajectory(TOY, TOY.sequence(5), (1,))
    drawn = [
        replace(first, log_omega=-1.0),
        second,
        replace(second, source={"version": 2}),
        replace(other, source={"version": 1}),
    ]
    batch = make_batch(drawn, {first.context: 5.0, other.context: 5.0})
    assert batch.log_omega.tolist() == [-1.0, 0.0, -np.inf, -np.inf]
    weights = np.exp([5.0 * first.reward - 1.0, 5.0 * second.reward])
    wanted = [*(3 * weights / weights.sum()), 0.0, 0.0]
    np.testing.assert_allclose(
        batch.shares(batch.tilt * batch.reward + batch.log_omega), wanted, atol=1e-12
    )
