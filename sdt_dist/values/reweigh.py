"""Old walks under another lambda and other multipliers, without a model call or a reward call.

See docs/concepts/exactness.md#shared-evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.tree.resample import effective_sample_size, normalise
from sdt_dist.values.catalogue import Catalogue
from sdt_dist.values.estimate import exact, places, shared_estimate
from sdt_dist.values.records import WalkRecord
from sdt_dist.values.tree import EvidenceTree


@dataclass(frozen=True, slots=True)
class Reweighed:
    """log Z with one standard error, ESS, and the law `probabilities` [S] over `sequences` with rewards [S].

    `walks` [S] holds one walk of each sequence (its tokens, components, log p), for decoding without the model.
    """

    log_z: float
    log_z_error: float
    ess: float
    exhausted: bool
    sequences: list[tuple[int, ...]]
    rewards: np.ndarray
    log_priors: np.ndarray
    probabilities: np.ndarray
    walks: list[WalkRecord]


def reweigh(
    walks: Sequence[WalkRecord], multipliers: Mapping[str, float], inverse_temperature: float
) -> Reweighed:
    """The estimate and the weights that evidence gives at (inverse_temperature, multipliers); nothing is computed anew.

    walks: all visible walks of one key (`EvidenceStore.walks`, `walks_of`): closed under what their vectors name.
    Unbiased for every lambda and gamma, since omega and S_i belong to the walk. ConfigurationError for no walks, a
    lambda that is not positive, or other reward terms.
    """
    if not walks:
        raise ConfigurationError(
            "walks: none, allowed: at least one; evidence under another key does not count."
        )
    if not 0 < inverse_temperature < np.inf:
        raise ConfigurationError(
            f"inverse_temperature: {inverse_temperature}, must be finite and > 0."
        )
    catalogue = Catalogue.of(walks, multipliers)
    tree = EvidenceTree(inverse_temperature, multipliers)
    tree.join(sorted(walks, key=lambda walk: (walk.stream, walk.number)))
    outcome = (
        exact(catalogue.log_priors, inverse_temperature * catalogue.rewards)
        if tree.is_exhausted
        else shared_estimate(walks, places(walks), catalogue, inverse_temperature)
    )
    return Reweighed(
        outcome.log_z,
        outcome.log_z_error,
        effective_sample_size(outcome.log_weights),
        tree.is_exhausted,
        catalogue.sequences,
        catalogue.rewards,
        catalogue.log_priors,
        normalise(outcome.log_weights),
        catalogue.walks,
    )
