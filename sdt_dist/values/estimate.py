"""Z-hat and the weights of sequences from a set of walks, each with what its own tree knew.

See docs/concepts/exactness.md, docs/concepts/exactness.md#shared-evidence.

It must not know stores, trees or searches: everything follows from the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdt_dist.tree.resample import log_sum
from sdt_dist.values.records import WalkRecord, reward_of

_CHUNK = 256  # vectors looked at together: bounds memory to _CHUNK x sequences


@dataclass(frozen=True, slots=True)
class Estimate:
    """Z-hat = sum_i c_i t_i with its standard error, and the weights log W [S] of the finished sequences."""

    log_z: float
    log_z_error: float
    log_weights: np.ndarray


def exact(log_priors: np.ndarray, log_tilts: np.ndarray) -> Estimate:
    """The exact answer once every sequence has been found: W = p E."""
    log_weights = log_priors + log_tilts
    return Estimate(log_sum(log_weights), 0.0, log_weights)


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
        names = [walk.sequence for walk in walks]
        sequences = sorted(set(names))
        index = {sequence: i for i, sequence in enumerate(sequences)}
        found = np.array([index[name] for name in names], dtype=np.int64)
        log_priors = np.full(len(sequences), np.inf)
        np.minimum.at(log_priors, found, [float(walk.log_prob.sum()) for walk in walks])
        one = dict(zip(reversed(names), reversed(walks), strict=True))
        chosen = [one[sequence] for sequence in sequences]
        rewards = np.array([reward_of(walk.components, multipliers) for walk in chosen])
        return cls(sequences, log_priors, rewards, found, chosen)


def places(walks: Sequence[WalkRecord], team: str | None = None) -> np.ndarray:
    """Each walk's place [N] in the order of tickets, 0 first; -1 where it has no ticket of its own (c = 0).

    Walks of other teams come first, by run and ticket. Of this team's walks with one ticket, made by several
    incarnations of a searcher, the latest incarnation's holds it. Nothing here depends on what a walk found.
    """
    order = sorted(
        range(len(walks)), key=lambda i: (walks[i].team == team, walks[i].team, *_turn(walks[i]))
    )
    last = {(w.ticket, w.searcher): i for i in order if (w := walks[i]).team == team}
    held = [
        i for i in order if walks[i].team != team or last[walks[i].ticket, walks[i].searcher] == i
    ]
    place = np.full(len(walks), -1, dtype=np.int64)
    place[held] = np.arange(len(held))
    return place


def _turn(walk: WalkRecord) -> tuple[int, int, int, int]:
    return walk.ticket, walk.searcher, walk.incarnation, walk.number


def shared_estimate(
    walks: Sequence[WalkRecord], place: np.ndarray, catalogue: Catalogue, inverse_temperature: float
) -> Estimate:
    """The estimate of docs/concepts/exactness.md with c_i = 2i / (N(N+1)) in the order of `place` [N] (see `places`).

    t_i = sum_{x in S_i} p(x)E(x) + omega_i E(x_i), with S_i all that the vector of walk i names. Given S_i each t_i
    has mean Z, so deviations of walks with different noise are uncorrelated; those that share noise are added up
    before they are squared.
    """
    held = np.flatnonzero(place >= 0)
    count = len(held)
    c = np.zeros(len(walks))
    c[held] = 2.0 * (place[held] + 1.0) / (count * (count + 1.0))
    log_tilts = inverse_temperature * catalogue.rewards
    view, log_known, c_seen = _views(walks, c, catalogue, catalogue.log_priors + log_tilts)
    found = catalogue.found[held]
    log_c = np.log(c[held])
    log_new = np.array([walks[i].log_omega for i in held]) + log_tilts[found]
    log_t = np.logaddexp(log_known[view[held]], log_new)
    log_z = float(np.logaddexp.reduce(log_c + log_t))
    deviation = np.exp(log_c) * np.expm1(log_t - log_z)
    _, noise = np.unique(
        np.array([walks[i].noise for i in held], dtype=np.uint64), return_inverse=True
    )
    error = float(np.sqrt(np.sum(np.bincount(noise, weights=deviation) ** 2)))
    with np.errstate(divide="ignore"):
        log_weights = catalogue.log_priors + log_tilts + np.log(c_seen)
    np.logaddexp.at(log_weights, found, log_c + log_new)
    return Estimate(log_z, error, log_weights)


def _views(
    walks: Sequence[WalkRecord], c: np.ndarray, catalogue: Catalogue, log_masses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Walks grouped by equal vectors: group [N], log of the mass known to each group [G], sum of c over views [S].

    A sequence is in a view when some stream found it before the view's count of that stream.
    """
    view, vectors = _distinct_vectors(walks)
    streams = {stream: i for i, stream in enumerate(dict.fromkeys(walk.stream for walk in walks))}
    first = np.full((len(streams), len(log_masses)), np.iinfo(np.int64).max)
    stream_of = np.array([streams[walk.stream] for walk in walks])
    flat = first.reshape(-1)
    np.minimum.at(
        flat, stream_of * len(log_masses) + catalogue.found, [walk.number for walk in walks]
    )
    counts = np.array(
        [[known.get(stream, 0) for stream in streams] for known in vectors], dtype=np.int64
    )
    c_group = np.bincount(view, weights=c, minlength=len(vectors))
    top = log_masses.max()
    masses = np.exp(log_masses - top)
    known_mass = np.empty(len(vectors))
    c_seen = np.zeros(len(log_masses))
    for begin in range(0, len(vectors), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        seen = np.zeros((len(counts[chunk]), len(masses)), dtype=bool)
        for row, limits in zip(first, counts[chunk].T, strict=True):
            seen |= row < limits[:, None]
        known_mass[chunk] = seen @ masses
        c_seen += c_group[chunk] @ seen
    with np.errstate(divide="ignore"):
        return view, np.log(known_mass) + top, c_seen


def _distinct_vectors(walks: Iterable[WalkRecord]) -> tuple[np.ndarray, list[Mapping[str, int]]]:
    names: dict[frozenset, int] = {}
    by_id: dict[int, int] = {}
    vectors = []
    view = []
    for walk in walks:
        group = by_id.get(id(walk.known))
        if group is None:
            group = names.setdefault(frozenset(walk.known.items()), len(vectors))
            by_id[id(walk.known)] = group
            if group == len(vectors):
                vectors.append(walk.known)
        view.append(group)
    return np.array(view, dtype=np.int64), vectors
