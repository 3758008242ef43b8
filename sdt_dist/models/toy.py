"""Tabular toys with exact soft values: Toy(V, T, z, kind, lambda, seed) of docs/concepts/exactness.md#toys.

Every sequence has length T; tables hold all V^t rows of every depth, so V(s), log Z and pi* are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy.special import logsumexp

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.rows import RowModel
from sdt_dist.protocols import Decoded, PriorLaw


class Toy(RowModel):
    """A random Zipf-like table model with a smooth reward in [0, 1], exact values included.

    vocab_size V, length T, zipf_exponent z, inverse_temperature lambda (of the exact values), seed. The
    reward of a sequence is additive in tokens and pairs, min-max scaled over all V^T sequences.
    """

    kinds = ("smooth",)

    def __init__(
        self,
        vocab_size: int,
        length: int,
        zipf_exponent: float,
        kind: str = "smooth",
        inverse_temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if kind not in self.kinds:
            raise ConfigurationError(f"toy kind: {kind!r}, allowed: {', '.join(self.kinds)}.")
        super().__init__()
        self.vocab_size = vocab_size
        self.length = length
        self.inverse_temperature = inverse_temperature
        self.max_context = length + 1
        rng = np.random.default_rng(seed)
        self.log_prob_tables = [
            _table(rng, vocab_size, depth, zipf_exponent) for depth in range(length)
        ]
        self.rewards = _smooth_reward(rng, vocab_size, length)

    @property
    def law(self) -> PriorLaw:
        return PriorLaw(allowed=(0, self.vocab_size))

    def compute_rows(self, sequences: list[tuple[int, ...]]) -> tuple[np.ndarray, list[int]]:
        rows = [self.log_prob_tables[len(s) - 1][self.index(s[1:])] for s in sequences]
        return np.stack(rows), [len(rows)]

    def index(self, tokens: Sequence[int]) -> int:
        """Position of a prefix among all prefixes of its length in lexicographic order."""
        position = 0
        for token in tokens:
            position = position * self.vocab_size + int(token)
        return position

    def sequence(self, index: int) -> tuple[int, ...]:
        """The full sequence at a lexicographic position."""
        return tuple(int(d) for d in np.unravel_index(index, (self.vocab_size,) * self.length))

    def score(self, samples: Sequence[Decoded]) -> np.ndarray:
        """Rewards [B] of finished samples."""
        return self.components(samples)["toy"]

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        """The single reward term [B]."""
        return {
            "toy": np.array([self.rewards[self.index(s.tokens)] for s in samples], dtype=np.float64)
        }

    @property
    def multipliers(self) -> dict[str, float]:
        return {"toy": 1.0}

    @cached_property
    def log_prior(self) -> np.ndarray:
        """log p [V^T] of all sequences in lexicographic order."""
        total = np.zeros(1)
        for table in self.log_prob_tables:
            total = (total[:, None] + table).ravel()
        return total

    @cached_property
    def soft_values(self) -> list[np.ndarray]:
        """Exact V(s) [V^t] for t = 0..T (docs/concepts/target.md, soft Bellman equation)."""
        values = [self.rewards]
        for table in reversed(self.log_prob_tables):
            children = values[-1].reshape(table.shape)
            values.append(
                np.asarray(logsumexp(table + self.inverse_temperature * children, axis=1))
                / self.inverse_temperature
            )
        return values[::-1]

    @property
    def log_z(self) -> float:
        """log E_p[exp(lambda r)] = lambda * V(root)."""
        return float(self.inverse_temperature * self.soft_values[0][0])

    @cached_property
    def target(self) -> np.ndarray:
        """pi* [V^T] over all sequences."""
        return np.exp(self.log_prior + self.inverse_temperature * self.rewards - self.log_z)


def _table(
    rng: np.random.Generator, vocab_size: int, depth: int, zipf_exponent: float
) -> np.ndarray:
    """log p [V^depth, V]: shuffled Zipf logits with Gaussian jitter, as docs/concepts/exactness.md#toys draws them."""
    num_prefixes = vocab_size**depth
    perm = np.argsort(rng.random((num_prefixes, vocab_size)), axis=1)
    logits = np.empty((num_prefixes, vocab_size))
    ranks = np.broadcast_to(-zipf_exponent * np.log(np.arange(vocab_size) + 1.0), perm.shape)
    np.put_along_axis(logits, perm, ranks, axis=1)
    logits += 0.3 * rng.standard_normal((num_prefixes, vocab_size))
    return logits - np.asarray(logsumexp(logits, axis=1, keepdims=True))


def _smooth_reward(rng: np.random.Generator, vocab_size: int, length: int) -> np.ndarray:
    """Rewards [V^T] in [0, 1]: token terms, then pair terms, min-max scaled (docs/concepts/exactness.md#toys, "smooth")."""
    digits = np.unravel_index(np.arange(vocab_size**length), (vocab_size,) * length)
    total = np.zeros(vocab_size**length)
    for t in range(length):
        total += rng.standard_normal(vocab_size)[digits[t]]
    for t in range(length - 1):
        total += (0.5 * rng.standard_normal((vocab_size, vocab_size)))[digits[t], digits[t + 1]]
    return (total - total.min()) / (total.max() - total.min())
