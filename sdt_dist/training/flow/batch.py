"""Trajectories as padded tensors, and what a flow network says of them: the input of the losses.

See docs/concepts/flow.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from sdt_dist.errors import DataError
from sdt_dist.flow.network import FlowNetwork
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.training.flow.trajectories import Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B trajectories of up to T steps with up to K candidates each; float64 but for ids.

    prompts [G, L] and prompt_lengths [G] of the G distinct contexts, group [B] which of them is a trajectory's; tokens
    [B, T], lengths [B]; reward [B]; log_omega [B]: log p/q of the law that drew it, -inf where not known; inverse_temperature [G]; candidates [B, T, K] (ids), candidate_log_weight [B, T, K]
    (-inf where there is none), candidate_reward [B, T, K] (NaN where not known), chosen [B, T]: the place of each token
    among its candidates; soft_values [B, T+1]: exact V, NaN where not known for this inverse temperature.
    """

    prompts: torch.Tensor
    prompt_lengths: torch.Tensor
    group: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    reward: torch.Tensor
    log_omega: torch.Tensor
    inverse_temperature: torch.Tensor
    candidates: torch.Tensor
    candidate_log_weight: torch.Tensor
    candidate_reward: torch.Tensor
    chosen: torch.Tensor
    soft_values: torch.Tensor

    @property
    def tilt(self) -> torch.Tensor:
        """lambda [B] of each trajectory."""
        return self.inverse_temperature[self.group]

    def shares(self, log_weight: torch.Tensor) -> torch.Tensor:
        """Shares [B] of weights exp(log_weight) [B] within each context, times its trajectories; 0 where all weights are."""
        groups = torch.zeros_like(self.inverse_temperature)
        top = groups.fill_(-torch.inf).scatter_reduce(0, self.group, log_weight, "amax")
        weight = torch.exp(
            log_weight - torch.where(top.isfinite(), top, torch.zeros_like(top))[self.group]
        )
        total = torch.zeros_like(top).index_add(0, self.group, weight)
        count = torch.zeros_like(top).index_add(0, self.group, torch.ones_like(weight))
        return weight * (count / total.clamp(min=1e-300))[self.group]

    @property
    def is_step(self) -> torch.Tensor:
        """[B, T]: whether a trajectory has a step t."""
        return (
            torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """F on a batch, in units of the reward: state [B, T+1] of F(s_t), candidates [B, T, K] of F(s_t.b).

    path [B, T]: minus the log-likelihood of what spectra became, for networks that predict it.
    """

    state: torch.Tensor
    candidates: torch.Tensor
    path: torch.Tensor | None = None

    @classmethod
    def of(cls, network: FlowNetwork, batch: Batch) -> Scores:
        """A network's values, float64; each context is encoded once."""
        hidden = _hidden(network, batch)
        of_p = _moments(network, batch)
        path = network.path_loss(hidden, batch.tokens, of_p)
        candidates = network.candidate_values(hidden[:, :-1], batch.candidates, of_p)
        return cls(network.state_values(hidden).double(), candidates.double(), path)


def path_of(network: FlowNetwork, batch: Batch) -> torch.Tensor:
    """`Scores.path` alone, of a network that predicts spectra."""
    of_p = _moments(network, batch)
    found = network.path_loss(_hidden(network, batch), batch.tokens, of_p)
    assert found is not None
    return found


def _hidden(network: FlowNetwork, batch: Batch) -> torch.Tensor:
    """What the network's heads read [B, T+1, D]."""
    tilt = batch.inverse_temperature.to(network.reward_mean.dtype)
    context = network.context(batch.prompts, batch.prompt_lengths, tilt)
    return network.hidden(context[batch.group], batch.tokens)


def _moments(network: FlowNetwork, batch: Batch) -> torch.Tensor:
    """What the network's heads are told of p (`FlowNetwork.moments`): [B, T, 2], for tokens with values."""
    log_weight = batch.candidate_log_weight.to(network.reward_mean.dtype)
    log_weight = torch.where(batch.is_step[..., None], log_weight, torch.zeros_like(log_weight))
    return network.moments(log_weight, network.values_of(batch.candidates))


def make_batch(
    trajectories: Sequence[Trajectory],
    inverse_temperatures: dict[str, float],
    spec: FlowSpec | None = None,
) -> Batch:
    """Pad trajectories; inverse_temperatures: lambda for each context (hex digest).

    DataError, with a spec, for tokens or lengths that its network cannot take.
    """
    if spec is not None:
        for trajectory in trajectories:
            check_trajectory(trajectory, spec)
    contexts = {t.context: t for t in trajectories}
    order = {context: i for i, context in enumerate(contexts)}
    columns = _padded_candidates(trajectories)
    soft_values = np.full((len(trajectories), columns.tokens.shape[1] + 1), np.nan)
    for row, trajectory in zip(soft_values, trajectories, strict=True):
        if (
            trajectory.soft_values is not None
            and trajectory.soft_values_at == inverse_temperatures[trajectory.context]
        ):
            row[: len(trajectory.soft_values)] = trajectory.soft_values
    prompts = np.zeros(
        (len(contexts), max(len(t.prompt) for t in contexts.values())), dtype=np.int64
    )
    for row, trajectory in zip(prompts, contexts.values(), strict=True):
        row[: len(trajectory.prompt)] = trajectory.prompt
    return Batch(
        prompts=torch.from_numpy(prompts),
        prompt_lengths=torch.tensor([len(t.prompt) for t in contexts.values()]),
        group=torch.tensor([order[t.context] for t in trajectories]),
        tokens=torch.from_numpy(columns.tokens),
        lengths=torch.tensor([len(t.tokens) for t in trajectories]),
        reward=torch.tensor([t.reward for t in trajectories], dtype=torch.float64),
        log_omega=torch.tensor([_log_omega(t) for t in trajectories], dtype=torch.float64),
        inverse_temperature=torch.tensor(
            [inverse_temperatures[c] for c in contexts], dtype=torch.float64
        ),
        candidates=torch.from_numpy(columns.candidates),
        candidate_log_weight=torch.from_numpy(columns.log_weight),
        candidate_reward=torch.from_numpy(columns.reward),
        chosen=torch.from_numpy(columns.chosen),
        soft_values=torch.from_numpy(soft_values),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Tokens and candidates of trajectories, padded: tokens, chosen [B, T]; candidates, log_weight, reward [B, T, K]."""

    tokens: np.ndarray
    candidates: np.ndarray
    log_weight: np.ndarray
    reward: np.ndarray
    chosen: np.ndarray


def _padded_candidates(trajectories: Sequence[Trajectory]) -> _Columns:
    """Flat columns fill the places that exist in their own order: by trajectory, step and candidate."""
    found = [t.candidates for t in trajectories]
    lowest = min(int(one.tokens.min()) for one in found)
    num_steps = np.array([len(t.tokens) for t in trajectories])
    is_step = np.arange(num_steps.max()) < num_steps[:, None]
    tokens = np.full(is_step.shape, lowest)
    counts = np.zeros(is_step.shape, dtype=np.int64)
    tokens[is_step] = np.concatenate([t.tokens for t in trajectories])
    counts[is_step] = np.concatenate([np.diff(one.ends, prepend=0) for one in found])
    is_candidate = np.arange(counts.max()) < counts[..., None]
    shape = is_candidate.shape
    candidates = np.full(shape, lowest)
    log_weight = np.full(shape, -np.inf)
    reward = np.full(shape, np.nan)
    candidates[is_candidate] = np.concatenate([one.tokens for one in found])
    log_weight[is_candidate] = np.concatenate([one.log_weight for one in found])
    reward[is_candidate] = np.concatenate([one.reward for one in found])
    chosen = ((candidates == tokens[..., None]) & is_candidate).argmax(axis=-1)
    return _Columns(tokens, candidates, log_weight, reward, chosen)


def _log_omega(trajectory: Trajectory) -> float:
    """log p/q of a trajectory: as noted, else 0 for a draw from p, which has no flow's version."""
    if trajectory.log_omega is not None:
        return trajectory.log_omega
    return 0.0 if trajectory.source.get("version") is None else -np.inf


def check_trajectory(trajectory: Trajectory, spec: FlowSpec) -> None:
    """DataError, naming the field, unless a network of this spec can take the trajectory."""
    low, high = spec.allowed
    if len(trajectory.tokens) > spec.max_new_tokens:
        raise DataError(
            f"trajectory: {len(trajectory.tokens)} tokens, the flow's max_new_tokens is {spec.max_new_tokens}; "
            "train a flow for longer samples."
        )
    if trajectory.candidates.tokens.min() < low or trajectory.candidates.tokens.max() >= high:
        raise DataError(
            f"trajectory: candidates outside the flow's allowed range [{low}, {high}); is it another model's?"
        )
    if (
        not len(trajectory.prompt)
        or trajectory.prompt.min() < 0
        or trajectory.prompt.max() >= spec.vocab_size
    ):
        raise DataError(
            f"trajectory: a prompt without tokens or with ids outside [0, {spec.vocab_size})."
        )
