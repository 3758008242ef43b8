"""Losses of the flow network, pure functions of a batch and of F on it (docs/concepts/flow.md).

All are per trajectory, [B]. But for `contrastive` and `path` they are in squared nats, and 0 at the exact soft values V where
candidates are complete rows of p.
Notation: lambda the inverse temperature, w_b what candidate b stands for under p, s_n the finished state, and

    step_t = lambda F(s_t.a_t) - log sum_b w_b exp(lambda F(s_t.b))  =  log P_F(a_t|s_t) - log p(a_t|s_t)

At the solution F = V: step_t = lambda (V(s_t+1) - V(s_t)), so sums of steps telescope.
"""

from __future__ import annotations

import torch

from sdt_dist.training.flow.batch import Batch, Scores


def chosen_values(scores: Scores, batch: Batch) -> torch.Tensor:
    """F(s_t.a_t) [B, T] from the token head."""
    return scores.candidates.gather(2, batch.chosen[..., None])[..., 0]


def log_sums(scores: Scores, batch: Batch) -> torch.Tensor:
    """log sum_b w_b exp(lambda F(s_t.b)) [B, T]; 0 beyond a trajectory's end."""
    tilt = batch.tilt[:, None, None]
    tilted = batch.candidate_log_weight + tilt * scores.candidates
    is_step = batch.is_step[..., None]
    tilted = torch.where(is_step, tilted, -_log_count(tilted))
    return torch.logsumexp(tilted, dim=2)


def log_ratios(scores: Scores, batch: Batch) -> torch.Tensor:
    """step_t [B, T], 0 beyond a trajectory's end."""
    tilt = batch.tilt[:, None]
    chosen = tilt * chosen_values(scores, batch)
    return _of_steps(chosen - log_sums(scores, batch), batch)


def relative_trajectory_balance(scores: Scores, batch: Batch) -> torch.Tensor:
    """( lambda F(root) + sum_t step_t - lambda r )^2 [B].

    Relative trajectory balance with log Z = lambda F(root) (Venkatraman et al. 2024, arXiv 2405.20971). It sees the token
    head only through P_F: children of one parent are fixed up to a constant, and F(root).
    """
    ends = batch.tilt * (scores.state[:, 0] - batch.reward)
    steps = log_ratios(scores, batch).sum(1)
    return (ends + steps) ** 2


def log_partition_variance(scores: Scores, batch: Batch) -> torch.Tensor:
    """( zeta - mean of zeta over the trajectories of its context )^2 [B], zeta = sum_t step_t - lambda r.

    Each -zeta estimates log Z(c), so it needs no F(root) (Zhang et al. 2023, arXiv 2302.05446; VarGrad of Richter et al.
    2020, arXiv 2010.10436). 0 for a context with one trajectory.
    """
    steps = log_ratios(scores, batch).sum(1)
    zeta = steps - batch.tilt * batch.reward
    none = torch.zeros_like(batch.inverse_temperature)
    count = none.index_add(0, batch.group, torch.ones_like(zeta))
    total = none.index_add(0, batch.group, zeta)
    mean = total / count
    return (zeta - mean[batch.group]) ** 2


def contrastive(scores: Scores, batch: Batch) -> torch.Tensor:
    """Minus n w_i sum_t step_t [B], w the share of omega exp(lambda r) of a trajectory among the n of its context.

    omega = p/q corrects for the law that drew it. The mean over a context estimates KL(pi* || P_F) up to a constant: maximum
    likelihood on importance-weighted draws, the contrastive twist learning of Zhao et al. 2024 (arXiv 2404.17546, section
    4.1). Unlike the other losses it is not 0 at V, where only its expected gradient vanishes; but poor samples, however
    many, do not rule it.
    """
    log_weight = batch.tilt * batch.reward + batch.log_omega
    shares = batch.shares(log_weight)
    steps = log_ratios(scores, batch).sum(1)
    return -shares * steps


def path(scores: Scores, batch: Batch) -> torch.Tensor:
    """Mean over t < n of minus the log-likelihood of what spectra became [B]; 0 where the network predicts none.

    No loss of F: it teaches the spectral head what samples become under p, weighted by omega as draws from p.
    """
    if scores.path is None:
        return torch.zeros_like(batch.reward)
    return path_alone(scores.path, batch)


def path_alone(path_loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`path` [B] of `Scores.path` [B, T]."""
    return batch.shares(batch.log_omega) * _step_mean(path_loss.double(), batch)


def subtrajectory_balance(scores: Scores, batch: Batch, subtb_lambda: float) -> torch.Tensor:
    """Mean over 0 <= i < j <= n, weighted by subtb_lambda^(j-i), of the squared residuals [B]

        lambda F(s_i) + sum_{i<=t<j} step_t - lambda F(s_j)

    with F from the state head and F(s_n) = r: SubTB(lambda) relative to p (Madan et al. 2023, arXiv 2209.12782). It pins
    the state head; `tie` carries that over to the token head.
    """
    # 1. The residual of (i, j) is potential_i - potential_j.
    states = batch.tilt[:, None] * finished_states(scores, batch)
    so_far = log_ratios(scores, batch).cumsum(1)
    potential = states - torch.nn.functional.pad(so_far, (1, 0))
    # 2. Pairs i < j <= n, and their weights.
    times = torch.arange(states.shape[1], device=batch.tokens.device)
    gap = times[None, :] - times[:, None]
    reached = times <= batch.lengths[:, None]
    inside = (gap > 0)[None] & reached[:, None, :]
    decay = float(subtb_lambda) ** gap.clamp(min=0).to(states.dtype)
    weight = torch.where(inside, decay, 0.0)
    # 3. Their weighted mean.
    difference = potential[:, :, None] - potential[:, None, :]
    residual = torch.where(inside, difference, 0.0)
    total = (weight * residual**2).sum((1, 2))
    return total / weight.sum((1, 2))


def bellman(scores: Scores, batch: Batch) -> torch.Tensor:
    """Mean over t < n of ( lambda F(s_t) - log sum_b w_b exp(lambda F(s_t.b)) )^2 [B], the soft Bellman equation of docs/concepts/target.md."""
    states = batch.tilt[:, None] * scores.state[:, :-1]
    residual = states - log_sums(scores, batch)
    return _step_mean(residual**2, batch)


def terminal(scores: Scores, batch: Batch) -> torch.Tensor:
    """( lambda F(s_n) - lambda r )^2 of the state head plus the token head's mean over finished children [B].

    Finished children are the trajectory's last one and candidates that other trajectories are known to have ended with.
    """
    tilt = batch.tilt
    last = scores.state.gather(1, batch.lengths[:, None])[:, 0]
    reward, known = _finished_children(batch)
    gap = tilt[:, None, None] * (scores.candidates - reward)
    error = torch.where(known, gap, 0.0) ** 2
    of_state = (tilt * (last - batch.reward)) ** 2
    of_tokens = error.sum((1, 2)) / known.sum((1, 2))
    return of_state + of_tokens


def tie(scores: Scores, batch: Batch) -> torch.Tensor:
    """Mean over t < n of ( lambda F_token(s_t.a_t) - lambda F_state(s_t+1) )^2 [B], with F_state(s_n) = r (docs/concepts/flow.md)."""
    states = finished_states(scores, batch)[:, 1:]
    gap = chosen_values(scores, batch) - states
    residual = batch.tilt[:, None] * gap
    return _step_mean(residual**2, batch)


def finished_states(scores: Scores, batch: Batch) -> torch.Tensor:
    """F(s_t) [B, T+1] of the state head, with r for the finished state."""
    times = torch.arange(scores.state.shape[1], device=batch.tokens.device)
    at_end = times == batch.lengths[:, None]
    return torch.where(at_end, batch.reward[:, None], scores.state)


def _finished_children(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(reward, whether it is known) [B, T, K] of candidates; the trajectory's own last token included."""
    device = batch.tokens.device
    places = torch.arange(batch.candidates.shape[2], device=device)
    times = torch.arange(batch.tokens.shape[1], device=device)
    is_last = times == batch.lengths[:, None] - 1
    is_chosen = places == batch.chosen[..., None]
    own = is_last[..., None] & is_chosen
    reward = torch.where(own, batch.reward[:, None, None], batch.candidate_reward)
    known = ~reward.isnan()
    return torch.where(known, reward, 0.0), known


def _of_steps(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.where(batch.is_step, values, 0.0)


def _step_mean(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    return _of_steps(values, batch).sum(1) / batch.lengths


def _log_count(values: torch.Tensor) -> torch.Tensor:
    """log K, so that a log-sum of K equal entries at minus this is 0 and has finite gradients."""
    return torch.log(values.new_tensor(values.shape[2]))
