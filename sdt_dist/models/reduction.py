"""From logits to what search needs: the law p, chosen tokens, residual masses.

See docs/concepts/target.md, docs/concepts/exactness.md.

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

from sdt_dist.errors import ContextError
from sdt_dist.noise import hash_key, hashed_uniform
from sdt_dist.protocols import PriorLaw

_BLOCK = 64  # tokens looked at together; in most blocks nothing can win
_NO_TOKEN = -1  # in a slot that no token is left for
_LEFT_OUT = -1.0  # instead of the mass of a token that must not be chosen
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
    outside it and `excluded` [B], and the number of tokens with p > 0 there [B] int32. ContextError for an excluded
    id that is no token.
    """
    scores = np.ascontiguousarray(scores)
    slots = np.ones(len(scores), dtype=np.int64)
    chosen, top, log_total, log_rest, count = _account(scores, slots, keys, excluded)
    tokens = chosen[:, 0]
    for row in np.flatnonzero(tokens == _NO_TOKEN):  # nothing left that float64 can tell from 0
        tokens[row] = _first(scores[row], excluded[row])
    return tokens, scores[np.arange(len(scores)), tokens] - top - log_total, log_rest, count


def largest(
    scores: np.ndarray,
    num_children: Sequence[int],
    keys: Sequence[int | None],
    excluded: Sequence[tuple[int, ...]],
) -> list[tuple[np.ndarray, np.ndarray, float, int]]:
    """The first `num_children` of the race that `draw` runs with a row's key, in order (of log p where it is None).

    They are the largest of log p + Gumbel(key): a draw without replacement whose first is that of `draw`. Fewer where
    no more are left, and of equals the lower tokens. scores [B, V] as from `law_scores`; a row's results do not depend
    on the others. Returns for each row tokens [K] int32, log p [K], and log mass and count of what remains. ContextError
    for an excluded id that is no token.
    """
    scores = np.ascontiguousarray(scores)
    slots = np.array([min(wanted, scores.shape[1]) for wanted in num_children], dtype=np.int64)
    tokens, top, log_total, *of_rest = _account(scores, slots, keys, excluded)
    log_prob = scores[np.arange(len(scores))[:, None], tokens] - top[:, None] - log_total[:, None]
    found = zip(
        (tokens != _NO_TOKEN).sum(axis=1).tolist(),
        *(column.tolist() for column in of_rest),
        strict=True,
    )
    return [
        (tokens[i, :n], log_prob[i, :n], log_rest, count)
        for i, (n, log_rest, count) in enumerate(found)
    ]


def measure(
    scores: np.ndarray, chosen: Sequence[Sequence[int]], excluded: Sequence[tuple[int, ...]]
) -> list[tuple[np.ndarray, float, int]]:
    """What `draw` and `largest` report, for tokens that were chosen in another way, such as under another law.

    scores [B, V] as from `law_scores`, chosen: K tokens a row. Returns for each row log p [K] of its tokens, and log mass
    and count of what is outside them and `excluded`, with the bits of `draw` and `largest`.
    """
    scores = np.ascontiguousarray(scores)
    taken = [(*left_out, *tokens) for left_out, tokens in zip(excluded, chosen, strict=True)]
    slots, keys = np.zeros(len(scores), dtype=np.int64), [None] * len(scores)
    _, top, log_total, log_rest, count = _account(scores, slots, keys, taken)
    rows = zip(
        chosen,
        scores,
        top.tolist(),
        log_total.tolist(),
        log_rest.tolist(),
        count.tolist(),
        strict=True,
    )
    return [
        (row[list(tokens)].astype(np.float64) - high - total, rest, left)
        for tokens, row, high, total, rest, left in rows
    ]


def _account(
    scores: np.ndarray,
    slots: np.ndarray,
    keys: Sequence[int | None],
    excluded: Sequence[tuple[int, ...]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, K] of the rows' races or orders; row maxima, log sums above them, logs and counts of the rest.

    Both `draw` and `largest` come here: the same compiled sums give both the same bits.
    """
    row_keys = np.array([key or 0 for key in keys], dtype=np.uint64)
    keyed = np.array([key is not None for key in keys])
    ends = np.array(list(accumulate(len(left_out) for left_out in excluded)), dtype=np.int64)
    masked = np.array([token for left_out in excluded for token in left_out], dtype=np.int32)
    if len(masked) and not 0 <= masked.min() <= masked.max() < scores.shape[1]:
        raise ContextError(
            f"excluded: token ids {masked.min()} to {masked.max()}, allowed 0 to {scores.shape[1] - 1}."
        )
    top = scores.max(axis=1).astype(np.float64)
    tokens = np.full((len(scores), slots.max(initial=0)), _NO_TOKEN, dtype=np.int32)
    total, rest, count = _account_rows(scores, top, slots, row_keys, keyed, ends, masked, tokens)
    with np.errstate(divide="ignore"):
        log_total = np.log(total)
        return tokens, top, log_total, np.log(rest) - log_total, count


def _first(scores: np.ndarray, excluded: tuple[int, ...]) -> int:
    """The most probable token outside `excluded`."""
    left = scores.astype(np.float64)
    left[list(excluded)] = -np.inf
    return int(left.argmax())


@njit(cache=True, error_model="numpy")
def _account_rows(scores, top, slots, keys, keyed, ends, masked, tokens):
    """Fill in slots [B] of tokens [B, K], as far as there are any to choose; total mass, mass and count of the rest.

    ends [B] are the ends of the rows' parts of `masked`. One row at a time, so that its masses stay in the cache.
    """
    num_rows, num_tokens = scores.shape
    total, rest = np.empty(num_rows), np.empty(num_rows)
    count = np.empty(num_rows, dtype=np.int32)
    mass, ranks = np.empty(num_tokens), np.empty(tokens.shape[1])
    for row in range(num_rows):
        _masses(scores[row], top[row], mass)
        total[row] = _sum(mass)
        left_out = masked[ends[row - 1] if row else 0 : ends[row]]
        best, chosen = ranks[: slots[row]], tokens[row, : slots[row]]
        _fill(mass, left_out, _LEFT_OUT)
        if slots[row] and keyed[row]:
            _race(mass, keys[row], best, chosen)
        elif slots[row]:
            _lead(scores[row], mass, best, chosen)
        _put_in_order(best, chosen)
        _fill(mass, left_out, 0.0)
        _fill(mass, chosen, 0.0)
        rest[row], count[row] = _sum(mass), _count_positive(mass)
    return total, rest, count


@njit(cache=True, error_model="numpy")
def _race(mass, key, ranks, tokens):
    """The first [K] of racers that finish at times E/mass: draws from mass without replacement, as a heap (`_sink`).

    The largest mass/E are the Gumbel-top-k largest log mass - log E. As E = -log1p(-w) >= w, a token can only get in
    where w * last < mass, and only there the logarithm is computed; w(1 + w/2) <= E leaves room for rounding.
    """
    low, high = hash_key(key)
    w = np.empty(_BLOCK)
    ranks[:] = last = 0.0
    for start in range(0, len(mass), _BLOCK):
        block = mass[start : start + _BLOCK]
        hopes = 0
        for i in range(len(block)):
            w[i] = hashed_uniform(start + i, low, high)
            hopes += w[i] * last < block[i]
        if hopes == 0:
            continue
        for i in range(len(block)):
            if w[i] * last < block[i]:
                speed = block[i] / -math.log1p(-w[i])
                if speed > last:
                    _sink(ranks, tokens, len(ranks), speed, start + i)
                    last = ranks[0]


@njit(cache=True)
def _lead(scores, mass, ranks, tokens):
    """The most probable tokens [K] whose mass is not _LEFT_OUT, as a heap (`_sink`)."""
    ranks[:] = last = -np.inf
    for start in range(0, len(scores), _BLOCK):
        block = scores[start : start + _BLOCK]
        hopes = 0
        for i in range(len(block)):
            hopes += block[i] > last
        if hopes == 0:
            continue
        for i in range(len(block)):
            if block[i] > last and mass[start + i] != _LEFT_OUT:
                _sink(ranks, tokens, len(ranks), np.float64(block[i]), start + i)
                last = ranks[0]


@njit(cache=True)
def _sink(ranks, tokens, size, rank, token):
    """Put (rank, token) in the place of the root of the heap that the first `size` pairs are.

    Its root is the last in order: the lowest rank and, of equal ranks, the highest token. Callers pass a float64 and an
    int64, so that it is compiled once.
    """
    place, child = 0, 1
    while child < size:
        if child + 1 < size and _is_before(
            ranks[child], tokens[child], ranks[child + 1], tokens[child + 1]
        ):
            child += 1
        if not _is_before(rank, token, ranks[child], tokens[child]):
            break
        ranks[place], tokens[place] = ranks[child], tokens[child]
        place, child = child, 2 * child + 1
    ranks[place], tokens[place] = rank, token


@njit(cache=True)
def _is_before(rank, token, other_rank, other_token):
    return rank > other_rank or (rank == other_rank and token < other_token)


@njit(cache=True)
def _put_in_order(ranks, tokens):
    """Turn a heap into its tokens from the first to the last."""
    for last in range(len(ranks) - 1, 0, -1):
        rank, token = ranks[last], np.int64(tokens[last])
        ranks[last], tokens[last] = ranks[0], tokens[0]
        _sink(ranks, tokens, last, rank, token)


@njit(cache=True)
def _fill(mass, tokens, value):
    for token in tokens:
        if token != _NO_TOKEN:
            mass[token] = value


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
