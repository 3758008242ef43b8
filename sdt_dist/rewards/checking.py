"""The one supervisor of rewards: whatever user code raises or returns becomes finite numbers or a RewardError.

Such an error names the reward, its term and the sample, and stops its own problem only (docs/guides/rewards.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sdt_dist.errors import RewardError, SdtError
from sdt_dist.protocols import Decoded


def weighted_sum(
    reward: Any, samples: Sequence[Decoded]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards [B] float64 and their raw terms [B] by name, of anything with `components` and `multipliers`.

    RewardError names the reward, the term and the sample where one is not a finite number or the shape is wrong.
    """
    terms = checked_terms(reward, samples)
    total = np.zeros(len(samples))
    with _supervised(reward), np.errstate(over="ignore", invalid="ignore"):
        for name, weight in reward.multipliers.items():
            total = total + weight * terms[name]
    return _numbers(total, f"reward {_label(reward)}, weighted sum", samples), terms


def checked_terms(reward: Any, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
    """Raw terms [B] float64, all finite; else, and for whatever the reward raises, a RewardError."""
    with _supervised(reward):
        terms = dict(reward.components(samples))
        if terms.keys() != reward.multipliers.keys():
            raise RewardError(
                f"reward {_label(reward)}: terms {sorted(terms)} but multipliers {sorted(reward.multipliers)}."
            )
        return {
            name: _numbers(v, f"reward {_label(reward)}, term {name!r}", samples)
            for name, v in terms.items()
        }


def checked_partial(reward: Any, samples: Sequence[Decoded]) -> np.ndarray:
    """Potentials [B] float64 of unfinished samples, all finite; RewardError as in `checked_terms`."""
    with _supervised(reward):
        return _numbers(reward.partial(samples), f"reward {_label(reward)}, partial form", samples)


@contextmanager
def _supervised(reward: Any) -> Iterator[None]:
    try:
        yield
    except SdtError:
        raise
    except Exception as error:  # user code may raise anything
        reason = " ".join(str(error).split())
        raise RewardError(
            f"reward {_label(reward)}: raised {type(error).__name__}: {reason}"
        ) from error


def _label(reward: Any) -> str:
    return getattr(reward, "label", type(reward).__name__)


def _numbers(values: Any, where: str, samples: Sequence[Decoded]) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise RewardError(
            f"{where}: holds {array.dtype} such as {array.ravel()[:1]}, allowed: numbers."
        )
    if array.shape != (len(samples),):
        raise RewardError(
            f"{where}: shape {array.shape} for {len(samples)} samples, allowed: one number per sample."
        )
    array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise RewardError(
            f"{where}: value {array[bad[0]]} for sample {samples[bad[0]].tokens[:8]}..., allowed: finite numbers; give "
            "hard violations a finite floor."
        )
    return array
