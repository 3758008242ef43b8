"""From logits to what search needs: the law p, chosen tokens, residual masses (SPEC sections 1 and 1.1).

The only place where masking, sampling temperature, top-k and top-p act and where tokens are chosen, so that
rollouts and expansions of every backend share one definition of p. Sums and log-probabilities are float64.
Numpy and Numba only; it must not know models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numba import njit

from sdt_dist.noise import exponential, hash_key, hashed_uniform
from sdt_dist.protocols import PriorLaw

_BLOCK = 64  # tokens whose hashes are looked at together; in most blocks nothing can win
_RACE, _NO_TOKEN = -1, -2  # instead of a token: draw one, or leave it
_LOWEST = -708.0  # exp of less is no normal float64


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


def draw(
    scores: np.ndarray, keys: Sequence[int | None], excluded: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One token a row outside `excluded`: a draw with the row's key, or the argmax where the key is None.

    scores [B, V] as from `law_scores`. Returns token [B] int32, its log p [B] under the law, the log of the mass
    outside it and `excluded` [B], and the number of tokens with p > 0 there [B] int32.
    """
    scores = np.ascontiguousarray(scores)
    greedy = [row for row, key in enumerate(keys) if key is None]
    tokens = np.full(len(scores), _RACE, dtype=np.int32)
    tokens[greedy] = [_first(scores[row], excluded[row]) for row in greedy]
    row_keys = np.array([key or 0 for key in keys] if greedy else keys, dtype=np.uint64)
    top, log_total, log_rest, count = _account(scores, row_keys, excluded, tokens)
    for row in np.flatnonzero(tokens < 0):  # nothing left that float64 can tell from 0
        tokens[row] = _first(scores[row], excluded[row])
    return tokens, scores[np.arange(len(scores)), tokens] - top - log_total, log_rest, count


def largest(
    scores: np.ndarray, num_children: int, key: int | None, excluded: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """The first `num_children` of the race that `draw` runs with this key, in order (of log p where key is None).

    They are the largest of log p + Gumbel(key): a draw without replacement whose first is that of `draw`. scores
    [1, V] as from `law_scores`. Returns tokens [K] int32, log p [K], and log mass and count of what remains.
    """
    scores = np.ascontiguousarray(scores)
    row_keys = np.array([key or 0], dtype=np.uint64)
    if key is None:
        ranks, nothing = scores[0].astype(np.float64), -np.inf
    else:
        ranks, nothing = np.empty(scores.shape[1]), 0.0
        _masses(scores[0], float(scores[0].max()), ranks)
        ranks /= exponential(row_keys, len(ranks))[0]
    ranks[list(excluded)] = nothing
    count = min(num_children, int((ranks > nothing).sum()))
    tokens = np.argsort(-ranks, kind="stable")[:count].astype(np.int32)
    taken = [(*excluded, *tokens.tolist())]
    top, log_total, log_rest, rest = _account(scores, row_keys, taken, np.array([_NO_TOKEN], dtype=np.int32))
    return tokens, scores[0, tokens].astype(np.float64) - top[0] - log_total[0], float(log_rest[0]), int(rest[0])


def _account(
    scores: np.ndarray, row_keys: np.ndarray, excluded: Sequence[tuple[int, ...]], tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Run the races that `tokens` [B] asks for, in place; row maxima, log sums above them, logs and counts of the rest.

    Both `draw` and `largest` come here: the same compiled sums give both the same bits.
    """
    ends = np.array(list(accumulate(len(left_out) for left_out in excluded)), dtype=np.int64)
    masked = np.array([token for left_out in excluded for token in left_out], dtype=np.int64)
    top = scores.max(axis=1).astype(np.float64)
    total, rest, count = _account_rows(scores, top, row_keys, ends, masked, tokens)
    with np.errstate(divide="ignore"):
        log_total = np.log(total)
        return top, log_total, np.log(rest) - log_total, count


def _first(scores: np.ndarray, excluded: tuple[int, ...]) -> int:
    """The most probable token outside `excluded`."""
    left = scores.astype(np.float64)
    left[list(excluded)] = -np.inf
    return int(left.argmax())


@njit(cache=True, error_model="numpy")
def _account_rows(scores, top, keys, ends, masked, tokens):
    """Fill in tokens [B] that are _RACE (they stay so where no mass is left); total mass, mass and count of the rest.

    ends [B] are the ends of the rows' parts of `masked`. One row at a time, so that its masses stay in the cache.
    """
    num_rows, num_tokens = scores.shape
    total, rest = np.empty(num_rows), np.empty(num_rows)
    count = np.empty(num_rows, dtype=np.int32)
    mass = np.empty(num_tokens)
    for row in range(num_rows):
        _masses(scores[row], top[row], mass)
        total[row] = _sum(mass)
        for place in range(ends[row - 1] if row else 0, ends[row]):
            mass[masked[place]] = 0.0
        if tokens[row] == _RACE:
            tokens[row] = _race(mass, keys[row])
        if tokens[row] >= 0:
            mass[tokens[row]] = 0.0
        rest[row], count[row] = _sum(mass), _count_positive(mass)
    return total, rest, count


@njit(cache=True, error_model="numpy")
def _race(mass, key):
    """The first of racers that finish at times E/mass, which is a draw from mass, or -1 where mass is all 0.

    argmax(mass/E) is the Gumbel-max argmax(log mass - log E). As E = -log1p(-w) >= w, a token can only win where
    w * best < mass, and only there the logarithm is computed; w(1 + w/2) <= E leaves room for rounding.
    """
    low, high = hash_key(key)
    w = np.empty(_BLOCK)
    best, winner = 0.0, -1
    for start in range(0, len(mass), _BLOCK):
        stop = min(_BLOCK, len(mass) - start)
        hopes = 0
        for i in range(stop):
            w[i] = hashed_uniform(start + i, low, high)
            hopes += w[i] * best < mass[start + i]
        if hopes == 0:
            continue
        for i in range(stop):
            if w[i] * best < mass[start + i]:
                speed = mass[start + i] / -math.log1p(-w[i])
                if speed > best:
                    best, winner = speed, start + i
    return winner


@njit(cache=True, error_model="numpy")
def _masses(scores, top, mass):
    """Write exp(scores - top) [V] float64, 0 where that is no normal number."""
    for token in range(len(scores)):
        mass[token] = exp_nonpositive(np.float64(scores[token]) - top)


@njit(cache=True, fastmath={"reassoc", "nsz"})
def _sum(values):
    """Sum of values [n] in vector order.

    Nothing is written here: beside a store the compiler chooses between two orders by where the arrays lie in memory.
    """
    total = 0.0
    for i in range(len(values)):
        total += values[i]
    return total


@njit(cache=True)
def _count_positive(values):
    count = 0
    for i in range(len(values)):
        count += values[i] > 0.0
    return count


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def exp_nonpositive(x):
    """exp of a float64 <= 0 to one unit in the last place, or 0 below -708: unlike math.exp it vectorises.

    x = k log 2 + r, |r| <= log(2)/2 (log 2 in two parts, as Cody and Waite), and Taylor's series for exp(r).
    """
    bounded = max(x, _LOWEST)
    k = np.floor(bounded * 1.4426950408889634 + 0.5)
    r = (bounded - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    series = 1.0 / 6227020800
    series = series * r + 1.0 / 479001600
    series = series * r + 1.0 / 39916800
    series = series * r + 1.0 / 3628800
    series = series * r + 1.0 / 362880
    series = series * r + 1.0 / 40320
    series = series * r + 1.0 / 5040
    series = series * r + 1.0 / 720
    series = series * r + 1.0 / 120
    series = series * r + 1.0 / 24
    series = series * r + 1.0 / 6
    series = series * r + 0.5
    series = series * r + 1.0
    series = series * r + 1.0
    power = np.int64((np.int64(k) + 1023) << 52).view(np.float64)
    return series * power if x > _LOWEST else 0.0
