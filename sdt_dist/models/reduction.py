"""From logits to what search needs: the law p, chosen tokens, residual masses (SPEC sections 1 and 1.1).

The only place where masking, sampling temperature, top-k and top-p act and where tokens are chosen, so that
rollouts and expansions of every backend share one definition of p. Sums and log-probabilities are float64.
Numpy only; it must not know models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdt_dist.noise import gumbel
from sdt_dist.protocols import PriorLaw


def law_scores(logits: np.ndarray, law: PriorLaw) -> np.ndarray:
    """Unnormalised log p [B, V] of the law for logits [B, V]; masked tokens are -inf."""
    low, high = law.allowed
    scores = logits
    if (low, high) != (0, logits.shape[1]):
        scores = np.full(logits.shape, -np.inf, dtype=logits.dtype)
        scores[:, low:high] = logits[:, low:high]
    if law.sampling_temperature != 1.0:
        scores = scores / law.sampling_temperature
    if law.top_k is not None and law.top_k < high - low:
        kth = np.partition(scores, -law.top_k, axis=1)[:, -law.top_k, None]
        scores = np.where(scores < kth, -np.inf, scores)
    if law.top_p is not None and law.top_p < 1.0:
        scores = _nucleus(scores, law.top_p)
    return scores


def _nucleus(scores: np.ndarray, top_p: float) -> np.ndarray:
    """Mask all but the smallest set of most probable tokens whose mass reaches top_p."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1).astype(np.float64)
    mass = np.exp(ranked - ranked[:, :1])
    mass /= mass.sum(axis=1, keepdims=True)
    outside = np.cumsum(mass, axis=1) - mass >= top_p
    rows = np.broadcast_to(np.arange(len(scores))[:, None], order.shape)
    kept = scores.copy()
    kept[rows[outside], order[outside]] = -np.inf
    return kept


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """log p [B, V] float64 of unnormalised scores."""
    top, mass = _mass(scores)
    return scores - top - np.log(mass.sum(axis=1, keepdims=True))


def draw(
    scores: np.ndarray, keys: Sequence[int | None], excluded: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One token a row outside `excluded`: Gumbel-max with the row's key, or the argmax where the key is None.

    scores [B, V] as from `law_scores`. Returns token [B] int32, its log p [B] under the law, the log of the mass
    outside it and `excluded` [B], and the number of tokens with p > 0 there [B] int32.
    """
    top, mass = _mass(scores)
    log_total = np.log(mass.sum(axis=1))
    rows = np.arange(len(scores))
    token = _perturbed(scores, keys, excluded).argmax(axis=1)
    log_prob = scores[rows, token] - top[:, 0] - log_total
    _clear(mass, excluded)
    mass[rows, token] = 0.0
    with np.errstate(divide="ignore"):
        log_residual = np.log(mass.sum(axis=1)) - log_total
    return token.astype(np.int32), log_prob, log_residual, np.count_nonzero(mass, axis=1).astype(np.int32)


def largest(
    scores: np.ndarray, num_children: int, key: int | None, excluded: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """The `num_children` largest of log p + Gumbel(key), in order (of log p itself where key is None).

    scores [1, V] as from `law_scores`. Returns tokens [K] int32, log p [K], and log mass and count of what remains.
    """
    top, mass = _mass(scores)
    log_total = np.log(mass.sum())
    perturbed = _perturbed(scores, [key], [excluded])[0]
    count = min(num_children, int((perturbed > -np.inf).sum()))
    tokens = np.argsort(-perturbed, kind="stable")[:count].astype(np.int32)
    log_prob = scores[0, tokens].astype(np.float64) - top[0, 0] - log_total
    _clear(mass, [(*excluded, *tokens.tolist())])
    with np.errstate(divide="ignore"):
        return tokens, log_prob, float(np.log(mass.sum()) - log_total), int(np.count_nonzero(mass))


def _mass(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row maxima [B, 1] and exp(scores - max) [B, V], in float64."""
    top = scores.max(axis=1, keepdims=True).astype(np.float64)
    return top, np.exp(scores - top)


def _clear(mass: np.ndarray, excluded: Sequence[tuple[int, ...]]) -> None:
    for row, tokens in enumerate(excluded):
        if tokens:
            mass[row, list(tokens)] = 0.0


def _perturbed(scores: np.ndarray, keys: Sequence[int | None], excluded: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Scores plus the noise of their keys, -inf at excluded tokens."""
    keyed = [row for row, key in enumerate(keys) if key is not None]
    if len(keyed) == len(keys):
        perturbed = scores + gumbel(np.array(keys, dtype=np.uint64), scores.shape[1])
    else:
        perturbed = scores.copy()
        noise_keys = np.array([keys[row] for row in keyed], dtype=np.uint64)
        perturbed[keyed] += gumbel(noise_keys, scores.shape[1])
    for row, tokens in enumerate(excluded):
        if tokens:
            perturbed[row, list(tokens)] = -np.inf
    return perturbed
