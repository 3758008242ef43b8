"""The distinct sequences that a set of walks found, each with its log p and its reward.

See docs/concepts/exactness.md. It must not know stores, trees or searches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdt_dist.values.records import WalkRecord, reward_of


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The distinct sequences of some walks, in the order of their tokens: log_priors [S], rewards [S].

    found [N]: which sequence each walk found.
    """

    sequences: list[tuple[int, ...]]
    log_priors: np.ndarray
    rewards: np.ndarray
    found: np.ndarray
    walks: list[WalkRecord]  # one of each sequence

    @classmethod
    def of(cls, walks: Sequence[WalkRecord], multipliers: Mapping[str, float]) -> Catalogue:
        """The sequences of walks [N], with rewards under these multipliers. ConfigurationError for other terms."""
        # 1. Name the sequences.
        names = [walk.sequence for walk in walks]
        sequences = sorted(set(names))
        index = {sequence: i for i, sequence in enumerate(sequences)}
        found = np.array([index[name] for name in names], dtype=np.int64)
        # 2. log p(x): where walks differ by rounding the smallest, which no order of walks changes.
        log_probs = [float(walk.log_prob.sum()) for walk in walks]
        log_priors = np.full(len(sequences), np.inf)
        np.minimum.at(log_priors, found, log_probs)
        # 3. r(x), of the first walk that found x.
        first: dict[tuple[int, ...], WalkRecord] = {}
        for name, walk in zip(names, walks, strict=True):
            first.setdefault(name, walk)
        chosen = [first[sequence] for sequence in sequences]
        rewards = np.array([reward_of(walk.components, multipliers) for walk in chosen])
        return cls(sequences, log_priors, rewards, found, chosen)
