"""Shared by the flow tests: trajectories of toys with complete rows, exact F tables, a family of toys by prompt, small checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from sdt_dist.flow.checkpoint import save_flow
from sdt_dist.flow.files import FlowFiles
from sdt_dist.flow.heads import build_network
from sdt_dist.flow.info import FlowInfo
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.card import ModelCard
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import prompt_digest
from sdt_dist.training.flow.batch import Batch, Scores
from sdt_dist.training.flow.trajectories import Candidates, Trajectory

Value = Callable[[tuple[int, ...]], float]


def toy_trajectory(model: Toy, tokens: tuple[int, ...], prompt: Sequence[int] = (0,)) -> Trajectory:
    """One sequence of a toy with complete rows and its exact soft values."""
    rows = [model.log_prob_tables[t][model.index(tokens[:t])] for t in range(len(tokens))]
    unknown = np.full(model.vocab_size, np.nan)
    ids = np.arange(model.vocab_size)
    return Trajectory(
        prompt_digest(prompt).hex(),
        np.array(prompt, dtype=np.int32),
        np.array(tokens, dtype=np.int32),
        np.array([row[token] for row, token in zip(rows, tokens, strict=True)]),
        Candidates.join([(ids, row, row, unknown) for row in rows]),
        float(model.rewards[model.index(tokens)]),
        soft_values=np.array([exact_value(model)(tokens[:t]) for t in range(len(tokens) + 1)]),
        soft_values_at=model.inverse_temperature,
    )


def save_small_flow(
    directory: Path,
    card: ModelCard,
    max_new_tokens: int,
    *,
    reward: str = "spectral:gamma=1",
    inverse_temperatures: tuple[float, float] = (0.5, 20.0),
    seed: int = 0,
) -> FlowFiles:
    """A checkpoint of a small flow with random weights, and its files."""
    spec = FlowSpec.of_card(card, max_new_tokens, hidden_size=16, key_size=16, context_length=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(spec)
    network.set_scale(0.5, 0.5)
    save_flow(
        directory, network, FlowInfo(card.identity, reward, inverse_temperatures, version=seed)
    )
    return FlowFiles.read(directory)


def shortened(trajectory: Trajectory, count: int) -> Trajectory:
    """The trajectory as if its token number `count` had ended it."""
    found = trajectory.candidates
    size = int(found.ends[count - 1])
    columns = [
        column[:size] for column in (found.tokens, found.log_prob, found.log_weight, found.reward)
    ]
    return replace(
        trajectory,
        tokens=trajectory.tokens[:count],
        log_prob=trajectory.log_prob[:count],
        candidates=Candidates(*columns, found.ends[:count]),
        soft_values=None,
        soft_values_at=None,
    )


def exact_value(model: Toy) -> Value:
    return lambda tokens: float(model.soft_values[len(tokens)][model.index(tokens)])


def scores_by(value: Value, batch: Batch) -> Scores:
    """F from any function of prefixes, in both heads."""
    num, steps, width = batch.candidates.shape
    state = torch.zeros(num, steps + 1, dtype=torch.float64)
    candidates = torch.zeros(num, steps, width, dtype=torch.float64)
    for b in range(num):
        tokens = tuple(batch.tokens[b].tolist())
        for t in range(int(batch.lengths[b]) + 1):
            state[b, t] = value(tokens[:t])
            for k in range(width if t < batch.lengths[b] else 0):
                candidates[b, t, k] = value((*tokens[:t], int(batch.candidates[b, t, k])))
    return Scores(state, candidates)


class FamilyMember(Toy):
    """A toy of 5 tokens and 4 steps whose prompt is its reward: 5 quantised weights, tokens 0..4 worth -1..1.

    r(x) = 0.5 + 0.25 (th_0 u_0 + th_1 u_1 + th_2 u_2 + th_3 u_3) / 2 + 0.25 th_4 mean of u_t u_t+1, u the tokens' values. The prior is
    that of Toy(5, 4, 1, seed 0), the same for all.
    """

    weights = 5

    def __init__(self, prompt: tuple[int, ...], inverse_temperature: float = 5.0) -> None:
        super().__init__(5, 4, 1.0, "smooth", inverse_temperature, 0)
        self.max_context = self.weights + self.length
        theta = np.array(prompt) / 2 - 1
        u = np.array(list(product(np.linspace(-1, 1, 5), repeat=4)))
        self.rewards = (
            0.5 + 0.125 * u @ theta[:4] + 0.25 * theta[4] * (u[:, 1:] * u[:, :-1]).mean(1)
        )

    def compute_rows(self, sequences: list[tuple[int, ...]]) -> tuple[np.ndarray, list[int]]:
        return super().compute_rows([s[self.weights - 1 :] for s in sequences])


def sibling_groups(model: Toy) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """(prefix, exact V of its children [V]) of every unfinished state."""
    groups = []
    for depth in range(model.length):
        children = model.soft_values[depth + 1].reshape(-1, model.vocab_size)
        prefixes = product(range(model.vocab_size), repeat=depth)
        groups += list(zip(prefixes, children, strict=True))
    return groups
