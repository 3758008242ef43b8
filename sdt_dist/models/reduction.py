"""From logits to what search needs: the law p in float64, chosen tokens, residual masses (SPEC sections 1 and 1.1).

The only place where masking, sampling temperature, top-k and top-p act and where tokens are chosen, so that
rollouts and expansions of every backend share one definition of p. Numpy only; it must not know models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdt_dist.noise import gumbel
from sdt_dist.protocols import PriorLaw


def law_log_probs(logits: np.ndarray, law: PriorLaw) -> np.ndarray:
    """log p [B, V] float64 of the law for logits [B, V]; masked tokens are -inf and p sums to 1."""
    low, high = law.allowed
    scores = np.full(logits.shape, -np.inf)
    scores[:, low:high] = logits[:, low:high]
    if law.sampling_temperature != 1.0:
        scores /= law.sampling_temperature
    if law.top_k is not None and law.top_k < high - low:
        kth = np.partition(scores, -law.top_k, axis=1)[:, -law.top_k, None]
        scores[scores < kth] = -np.inf
    if law.top_p is not None and law.top_p < 1.0:
        _keep_nucleus(scores, law.top_p)
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores


def _keep_nucleus(scores: np.ndarray, top_p: float) -> None:
    """Mask in place all but the smallest set of most probable tokens whose mass reaches top_p."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    mass = np.exp(ranked - ranked[:, :1])
    mass /= mass.sum(axis=1, keepdims=True)
    outside = np.cumsum(mass, axis=1) - mass >= top_p
    rows = np.broadcast_to(np.arange(len(scores))[:, None], order.shape)
    scores[rows[outside], order[outside]] = -np.inf


def draw(
    log_probs: np.ndarray, keys: Sequence[int | None], excluded: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One token a row outside `excluded`: Gumbel-max with the row's key, or the argmax where the key is None.

    log_probs [B, V] float64. Returns token [B] int32, its log p [B], log of the mass outside it and
    `excluded` [B], and the number of tokens with p > 0 there [B] int32.
    """
    open_scores = _without(log_probs, excluded)
    perturbed = open_scores + _noise(keys, log_probs.shape[1])
    token = perturbed.argmax(axis=1)
    rows = np.arange(len(log_probs))
    open_scores[rows, token] = -np.inf
    log_residual, num_remaining = _mass(open_scores)
    return token.astype(np.int32), log_probs[rows, token], log_residual, num_remaining


def largest(
    log_probs: np.ndarray, num_children: int, key: int | None, excluded: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """The `num_children` largest of log p + Gumbel(key), in order (of log p itself where key is None).

    log_probs [V] float64. Returns tokens [K] int32, log p [K], and log mass and count of what remains.
    """
    scores = _without(log_probs[None], [excluded])
    perturbed = (scores + _noise([key], log_probs.shape[0]))[0]
    count = min(num_children, int(np.isfinite(perturbed).sum()))
    tokens = np.argsort(-perturbed, kind="stable")[:count].astype(np.int32)
    scores[0, tokens] = -np.inf
    log_residual, num_remaining = _mass(scores)
    return tokens, log_probs[tokens], float(log_residual[0]), int(num_remaining[0])


def _without(log_probs: np.ndarray, excluded: Sequence[tuple[int, ...]]) -> np.ndarray:
    scores = log_probs.copy()
    for row, tokens in enumerate(excluded):
        if tokens:
            scores[row, list(tokens)] = -np.inf
    return scores


def _noise(keys: Sequence[int | None], num_tokens: int) -> np.ndarray:
    noise = np.zeros((len(keys), num_tokens), dtype=np.float32)
    keyed = [row for row, key in enumerate(keys) if key is not None]
    if keyed:
        noise[keyed] = gumbel(np.array([keys[row] for row in keyed], dtype=np.uint64), num_tokens)
    return noise


def _mass(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mass = np.exp(scores)
    with np.errstate(divide="ignore"):
        return np.log(mass.sum(axis=1)), np.count_nonzero(mass, axis=1).astype(np.int32)
