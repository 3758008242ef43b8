"""`dts` on a toy, written a second time from docs/concepts/exactness.md: no code, tree or random numbers of the product.

It exists so that the product's mean error can be checked against something less noisy than a table of 16 searches.
A new state has no draws, so its first visit draws from p: the rollout is the widening rule at new states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdt_dist.models.toy import Toy


@dataclass(slots=True)
class _State:
    """One prefix: prior p [V]; per token how often a draw gave it, and its value."""

    p: np.ndarray
    multiplicity: np.ndarray
    values: np.ndarray
    visits: int = 0
    draws: int = 0

    def arms(self, strength: float, horvitz_thompson: bool) -> tuple[np.ndarray, np.ndarray, float]:
        """Tokens drawn so far, their selection probabilities, and the state's soft value."""
        drawn = np.flatnonzero(self.multiplicity)
        weights = self.multiplicity[drawn].astype(np.float64)
        if horvitz_thompson:
            weights = self.p[drawn] / (1.0 - (1.0 - self.p[drawn]) ** self.draws)
        top = self.values[drawn].max()
        masses = weights * np.exp(strength * (self.values[drawn] - top))
        total = masses.sum()
        return drawn, masses / total, float(top + np.log(total / weights.sum()) / strength)


def dts_law(
    model: Toy,
    num_rollouts: int,
    rng: np.random.Generator,
    horvitz_thompson: bool,
    growth: float = 2.0,
    power: float = 0.8,
) -> np.ndarray:
    """Law [V^T] of the final walks of one search; every walk, repeated sequences included, is a rollout."""
    strength = model.inverse_temperature
    states = dict[tuple[int, ...], _State]()
    for _ in range(num_rollouts):
        walk: tuple[int, ...] = ()
        while len(walk) < model.length:
            if walk not in states:
                p = np.exp(model.log_prob_tables[len(walk)][model.index(walk)])
                states[walk] = _State(
                    p / p.sum(), np.zeros(len(p), dtype=np.int64), np.full(len(p), np.nan)
                )
            state = states[walk]
            state.visits += 1
            if state.draws < growth * state.visits**power:
                token = int(rng.choice(len(state.p), p=state.p))
                state.draws += 1
                state.multiplicity[token] += 1
            else:
                drawn, probabilities, _ = state.arms(strength, horvitz_thompson)
                token = int(rng.choice(drawn, p=probabilities))
            walk = (*walk, token)
        value = float(model.rewards[model.index(walk)])
        for depth in reversed(range(model.length)):
            state = states[walk[:depth]]
            state.values[walk[depth]] = value
            value = state.arms(strength, horvitz_thompson)[2]
    law = np.zeros(len(model.target))
    reach: dict[tuple[int, ...], float] = {(): 1.0}
    for prefix in sorted(states, key=len):
        drawn, probabilities, _ = states[prefix].arms(strength, horvitz_thompson)
        reach |= {
            (*prefix, t): reach[prefix] * q
            for t, q in zip(drawn.tolist(), probabilities.tolist(), strict=True)
        }
    for walk, probability in reach.items():
        if len(walk) == model.length:
            law[model.index(walk)] = probability
    return law
