"""Counter-based randomness: 64-bit keys, uniforms and Gumbel noise that depend on names, never on call order.

A *stream* is a 64-bit key derived from integers such as (seed, problem, searcher, law, ticket); position t
of a stream has the row key `position_key(stream, t)`; token a at that position gets Gumbel noise from
(row key, a). Two calls that share a key therefore share their noise, in whatever batch they are computed
(SPEC section 1, "counter-based noise"). Gumbel-max: argmax_a(log p_a + g_a) is a draw from p; the k largest
are k draws without replacement (Kool et al. 2019, arXiv 1903.06059, section 2).
This module must not know models or searches.
"""

from __future__ import annotations

import hashlib

import numpy as np

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


def uniform(key: int, index: int) -> float:
    """Uniform in (0, 1) number `index` of a stream, with 53 random bits."""
    return ((mix64(key + (index + 1) * _GOLDEN) >> 11) + 0.5) / (1 << 53)


def gumbel(row_keys: np.ndarray, num_tokens: int) -> np.ndarray:
    """Gumbel(0, 1) noise [B, V] float32 for row keys [B] uint64, one value per (row key, token).

    Each value comes from 32 hashed bits w: E = -log1p(-w) is exponential with full relative precision near
    0, where the largest Gumbels -log(E) live, so the law is exact to 2^-32 in probability.
    """
    keys = np.asarray(row_keys, dtype=np.uint64)
    mixed = _mix64_array(keys)
    low = (mixed & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None]
    high = (mixed >> np.uint64(32)).astype(np.uint32)[:, None]
    x = np.arange(num_tokens, dtype=np.uint32)[None, :] * np.uint32(0x9E3779B9) + low
    x = _hash32(x) ^ high
    x = _hash32(x)
    w = (x.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    np.minimum(w, np.float32(1.0 - 2.0**-24), out=w)
    np.negative(w, out=w)
    np.log1p(w, out=w)
    np.negative(w, out=w)
    np.log(w, out=w)
    return np.negative(w, out=w)


def _hash32(x: np.ndarray) -> np.ndarray:
    """A 32-bit avalanche hash of an array (Wellons, "lowbias32"), in place where possible."""
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def _mix64_array(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
