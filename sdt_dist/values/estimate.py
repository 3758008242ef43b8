"""Z-hat and the weights of sequences from a set of walks, each with what its own tree knew.

See docs/concepts/exactness.md, docs/concepts/exactness.md#shared-evidence.

It must not know stores, trees or searches: everything follows from the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdt_dist.tree.resample import log_sum
from sdt_dist.values.catalogue import Catalogue
from sdt_dist.values.records import WalkRecord
from sdt_dist.values.views import known_masses


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


def places(walks: Sequence[WalkRecord], team: str | None = None) -> np.ndarray:
    """Each walk's place [N] in the order of tickets, 0 first; -1 where it has no ticket of its own (c = 0).

    Walks of other teams come first, by run and ticket. Of this team's walks with one ticket, made by several
    incarnations of a searcher, the latest incarnation's holds it. Nothing here depends on what a walk found.
    """
    in_turn = sorted(range(len(walks)), key=lambda i: _turn(walks[i], team))
    holder: dict[tuple[int, int], int] = {}
    for i in in_turn:
        if walks[i].team == team:
            holder[walks[i].ticket, walks[i].searcher] = i
    place = np.full(len(walks), -1, dtype=np.int64)
    num_held = 0
    for i in in_turn:
        walk = walks[i]
        if walk.team != team or holder[walk.ticket, walk.searcher] == i:
            place[i] = num_held
            num_held += 1
    return place


def _turn(walk: WalkRecord, team: str | None) -> tuple[bool, str, int, int, int, int]:
    is_ours = walk.team == team
    return is_ours, walk.team, walk.ticket, walk.searcher, walk.incarnation, walk.number


def shared_estimate(
    walks: Sequence[WalkRecord],  # [N]
    place: np.ndarray,  # [N], see `places`
    catalogue: Catalogue,  # of these walks, S sequences
    inverse_temperature: float,  # lambda
) -> Estimate:
    """The estimate of docs/concepts/exactness.md with c_i = 2i / (N(N+1)) in the order of `place`.

    t_i = sum_{x in S_i} p(x)E(x) + omega_i E(x_i), with S_i all that the vector of walk i names. Given S_i each t_i
    has mean Z, so deviations of walks with different noise are uncorrelated; those that share noise are added up
    before they are squared.
    """
    held = np.flatnonzero(place >= 0)
    found = catalogue.found[held]
    log_tilts = inverse_temperature * catalogue.rewards  # log E(x) [S]
    log_masses = catalogue.log_priors + log_tilts  # log p(x)E(x) [S]

    # 1. Coefficients c_i = 2i / (N(N+1)), which look at places only.
    c = _coefficients(place, held)
    log_c = np.log(c[held])
    # 2. What walk i's tree knew: sum of p(x)E(x) over x in S_i.
    log_known, c_seen = known_masses(walks, catalogue.found, c, log_masses)
    # 3. What it estimated: omega_i E(x_i).
    log_omega = np.array([walks[i].log_omega for i in held])
    log_new = log_omega + log_tilts[found]
    # 4. t_i = known + estimated; Z-hat = sum_i c_i t_i.
    log_t = np.logaddexp(log_known[held], log_new)
    log_z = float(np.logaddexp.reduce(log_c + log_t))
    # 5. Error of log Z-hat: sqrt of the sum over noises of (sum over their walks of c_i (t_i/Z-hat - 1))^2.
    noises = np.array([walks[i].noise for i in held], dtype=np.uint64)
    deviations = np.exp(log_c) * np.expm1(log_t - log_z)
    log_z_error = _root_of_squares(deviations, noises)
    # 6. W(x) = p(x)E(x) sum_{i: x in S_i} c_i + sum_{i: x_i = x} c_i omega_i E(x).
    with np.errstate(divide="ignore"):
        log_weights = log_masses + np.log(c_seen)
    np.logaddexp.at(log_weights, found, log_c + log_new)
    return Estimate(log_z, log_z_error, log_weights)


def _coefficients(place: np.ndarray, held: np.ndarray) -> np.ndarray:
    """c [N] of walks with places [N], those in `held` counted from 0; 0 for the others."""
    num_held = len(held)
    c = np.zeros(len(place))
    c[held] = 2.0 * (place[held] + 1.0) / (num_held * (num_held + 1.0))
    return c


def _root_of_squares(deviations: np.ndarray, noises: np.ndarray) -> float:
    """Root of the sum of squared deviations [N], those of one noise [N] added up first."""
    _, noise = np.unique(noises, return_inverse=True)
    of_noise = np.bincount(noise, weights=deviations)
    return float(np.sqrt(np.sum(of_noise**2)))
