"""Counter-based randomness: 64-bit keys, uniforms and Gumbel noise that depend on names, never on call order.

A *stream* is a 64-bit key derived from integers such as (seed, problem, searcher, law, ticket); position t
of a stream has the row key `position_key(stream, t)`; token a at that position gets Gumbel noise from
(row key, a). Two calls that share a key therefore share their noise, in whatever batch they are computed
(docs/concepts/target.md, "counter-based noise"). Gumbel-max: argmax_a(log p_a + g_a) is a draw from p; the k largest
are k draws without replacement (Kool et al. 2019, arXiv 1903.06059, section 2).
This module must not know models or searches.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from numba import njit

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(x: int) -> int:
    """The splitmix64 finaliser of a 64-bit integer (Steele, Lea and Flood 2014)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def stream_key(*parts: int | str) -> int:
    """A 64-bit key from a tuple of integers and strings, the same in every process (blake2b)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def position_key(stream: int, position: int) -> int:
    """The row key of position `position` of a stream; consecutive positions differ by one odd constant."""
    return (stream + position * _GOLDEN) & _MASK


def proposal_key(row_key: int, flow: str) -> int:
    """The row key of the draws from q with the flow of this identity, where draws from p have `row_key`."""
    return mix64(row_key ^ _law_salt(flow))


@lru_cache(maxsize=64)
def _law_salt(flow: str) -> int:
    return stream_key("q", flow)


def uniform(key: int, index: int) -> float:
    """Uniform in (0, 1) number `index` of a stream, with 53 random bits."""
    return ((mix64(key + (index + 1) * _GOLDEN) >> 11) + 0.5) / (1 << 53)


def exponential(row_keys: np.ndarray, num_tokens: int) -> np.ndarray:
    """Exponential(1) noise [B, V] float64 for row keys [B] uint64, one value per (row key, token).

    Each value is E = -log1p(-w) of 32 hashed bits w: it has full relative precision near 0, where the races are won,
    so that the law of a draw is exact to 2^-32 in probability.
    """
    keys = np.ascontiguousarray(row_keys, dtype=np.uint64)
    return _exponentials(keys, num_tokens)


def gumbel(row_keys: np.ndarray, num_tokens: int) -> np.ndarray:
    """Gumbel(0, 1) noise [B, V] float64 for row keys [B] uint64: -log of their exponential noise."""
    return -np.log(exponential(row_keys, num_tokens))


@njit(cache=True, error_model="numpy")
def _exponentials(keys, num_tokens):
    noise = np.empty((len(keys), num_tokens))
    for row in range(len(keys)):
        low, high = hash_key(keys[row])
        for token in range(num_tokens):
            noise[row, token] = -math.log1p(-hashed_uniform(token, low, high))
    return noise


@njit(cache=True)
def hash_key(key):
    """The two 32-bit halves of a mixed row key, from which all noise of its row comes."""
    x = np.uint64(key)
    x = np.uint64((x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    x = np.uint64((x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    x = np.uint64(x ^ (x >> np.uint64(31)))
    return np.uint32(x & np.uint64(0xFFFFFFFF)), np.uint32(x >> np.uint64(32))


@njit(cache=True)
def hashed_uniform(token, low, high):
    """The uniform w in (0, 1) of a token in a row: 32 hashed bits, exact in float64, never 0 or 1."""
    x = np.uint32(np.uint32(token) * np.uint32(0x9E3779B9) + low)
    x = _hash32(np.uint32(_hash32(x) ^ high))
    return (np.float64(x) + 0.5) * 2.0**-32


@njit(cache=True)
def _hash32(x):
    """A 32-bit avalanche hash (Wellons, "lowbias32"); the casts keep Numba from widening to 64 bits."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))
