"""What each walk's own tree knew: the sets S_i that the version vectors of walks name.

See docs/concepts/exactness.md#shared-evidence. It must not know stores, trees or searches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sdt_dist.values.records import WalkRecord

_CHUNK = 256  # vectors looked at together: bounds memory to _CHUNK x sequences
_NEVER = np.iinfo(np.int64).max
_Vector = Mapping[str, int]


def known_masses(
    walks: Sequence[WalkRecord],  # [N]
    found: np.ndarray,  # [N], which sequence each walk found
    c: np.ndarray,  # [N], the walks' coefficients
    log_masses: np.ndarray,  # [S], log p(x)E(x)
) -> tuple[np.ndarray, np.ndarray]:
    """(log of the sum of p(x)E(x) over x in S_i [N], sum of c_i over the walks with x in S_i [S])."""
    # 1. Walks with equal vectors have one S_i, and are taken together.
    group, vectors = _distinct_vectors(walks)
    c_of_group = np.bincount(group, weights=c, minlength=len(vectors))
    # 2. x is in S_i when some stream found it before the vector's count of that stream.
    streams = list(dict.fromkeys(walk.stream for walk in walks))
    first = _first_finds(walks, found, streams, len(log_masses))
    limits = _limits(vectors, streams)
    # 3. Add up, scaled by the largest mass.
    top = log_masses.max()
    masses = np.exp(log_masses - top)
    known = np.empty(len(vectors))
    c_seen = np.zeros(len(log_masses))
    for begin in range(0, len(vectors), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        seen = _seen(first, limits[chunk])
        known[chunk] = seen @ masses
        c_seen += c_of_group[chunk] @ seen
    with np.errstate(divide="ignore"):
        log_known = np.log(known) + top
    return log_known[group], c_seen


def _distinct_vectors(walks: Iterable[WalkRecord]) -> tuple[np.ndarray, list[_Vector]]:
    """(which vector each walk has [N], the vectors that differ [G]). Walks of a wave hold one object."""
    by_items: dict[frozenset, int] = {}
    by_id: dict[int, int] = {}
    vectors: list[_Vector] = []
    groups = []
    for walk in walks:
        group = by_id.get(id(walk.known))
        if group is None:
            items = frozenset(walk.known.items())
            group = by_items.setdefault(items, len(vectors))
            by_id[id(walk.known)] = group
            if group == len(vectors):
                vectors.append(walk.known)
        groups.append(group)
    return np.array(groups, dtype=np.int64), vectors


def _first_finds(
    walks: Sequence[WalkRecord],  # [N]
    found: np.ndarray,  # [N]
    streams: Sequence[str],  # [R]
    num_sequences: int,  # S
) -> np.ndarray:
    """The number [R, S] of the walk by which each stream first found each sequence."""
    row_of = {stream: row for row, stream in enumerate(streams)}
    rows = np.array([row_of[walk.stream] for walk in walks])
    numbers = [walk.number for walk in walks]
    first = np.full(len(streams) * num_sequences, _NEVER)
    np.minimum.at(first, rows * num_sequences + found, numbers)
    return first.reshape(len(streams), num_sequences)


def _limits(vectors: Sequence[_Vector], streams: Sequence[str]) -> np.ndarray:
    """Each vector's count of each stream [G, R]."""
    limits = np.zeros((len(vectors), len(streams)), dtype=np.int64)
    for row, vector in zip(limits, vectors, strict=True):
        row[:] = [vector.get(stream, 0) for stream in streams]
    return limits


def _seen(first: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Whether each of some vectors' counts limits [C, R] takes in each sequence [C, S]; first [R, S]."""
    seen = np.zeros((len(limits), first.shape[1]), dtype=bool)
    for finds, limit in zip(first, limits.T, strict=True):
        seen |= finds < limit[:, None]
    return seen
