"""Tilts of requests, and what replies say of the proposal q, as columns of a message.

See docs/concepts/flow.md#proposal.

A part of `wire`: rows without a tilt take one index or one flag. It must not know who holds flows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdt_dist.models.remote.columns import (
    Arrays,
    column,
    integers,
    joined,
    pack_lists,
    require,
    slices,
    unpack_lists,
)
from sdt_dist.protocols import Expansion, Rollout, Tilt

_NO_TILT = -1
_LONGEST_NAME = 1 << 10  # bytes of a flow's identity


def pack_tilts(tilts: Sequence[Tilt | None]) -> Arrays:
    """Which of T tilts each of N requests has, and those T: the flow's identity in UTF-8, lambda, the law drawn from."""
    places: dict[Tilt, int] = {}
    index = [_NO_TILT if tilt is None else places.setdefault(tilt, len(places)) for tilt in tilts]
    return {
        "tilt": integers("tilt", index, np.int32),
        **pack_lists("flow", [tilt.flow.encode() for tilt in places], np.uint8),
        "tilt_strength": np.array([tilt.inverse_temperature for tilt in places], dtype=np.float64),
        "draws_proposal": np.array([tilt.draws == "q" for tilt in places], dtype=np.bool_),
    }


def unpack_tilts(arrays: Mapping[str, np.ndarray], size: int) -> list[Tilt | None]:
    """The tilts of `size` requests; ConfigurationError when malformed."""
    strengths = column(arrays, "tilt_strength", np.float64)
    from_q = column(arrays, "draws_proposal", np.bool_, len(strengths)).tolist()
    names = unpack_lists(arrays, "flow", np.uint8, len(strengths))
    require(
        all(len(name) <= _LONGEST_NAME for name in names), "flow", f"at most {_LONGEST_NAME} bytes"
    )
    require(bool(np.isfinite(strengths).all()), "tilt_strength", "finite")
    tilts = [
        Tilt(_text(name), strength, "q" if proposal else "p")
        for name, strength, proposal in zip(names, strengths.tolist(), from_q, strict=True)
    ]
    index = column(arrays, "tilt", np.int32, size)
    allowed = not size or (index.min() >= _NO_TILT and index.max() < len(tilts))
    require(allowed, "tilt", f"{_NO_TILT} to {len(tilts) - 1}")
    return [None if i == _NO_TILT else tilts[i] for i in index.tolist()]


def _text(name: tuple[int, ...]) -> str:
    text = bytes(name).decode(errors="replace")
    require(text.encode() == bytes(name), "flow", "UTF-8")
    return text


def pack_proposals(expansions: Sequence[Expansion], rollouts: Sequence[Rollout]) -> Arrays:
    """Which replies had a tilt, and log q, its log mass outside and lambda F of those that had."""
    columns: Arrays = {}
    for name, replies in (("children", expansions), ("steps", rollouts)):
        tilted = [reply for reply in replies if reply.log_proposal is not None]
        residuals = [
            np.atleast_1d(np.asarray(reply.log_residual_proposal, dtype=np.float64))
            for reply in tilted
        ]
        columns |= {
            f"{name}_tilted": np.array(
                [reply.log_proposal is not None for reply in replies], dtype=np.bool_
            ),
            f"{name}_log_proposal": joined(
                [np.asarray(reply.log_proposal) for reply in tilted], np.float64
            ),
            f"{name}_log_residual_proposal": joined(residuals, np.float64),
            f"{name}_log_tilt": joined(
                [np.asarray(reply.log_tilt) for reply in tilted], np.float64
            ),
        }
    return columns


def unpack_proposals(
    arrays: Mapping[str, np.ndarray], name: str, sizes: np.ndarray
) -> list[dict[str, Any]]:
    """log_proposal, log_residual_proposal and log_tilt of each reply of a kind, nothing where it had no tilt.

    sizes [N]: how many children, or steps, each reply has.
    """
    tilted = column(arrays, f"{name}_tilted", np.bool_, len(sizes))
    inner = sizes[tilted]
    total = int(inner.sum())
    is_expansion = name == "children"
    residual = column(
        arrays, f"{name}_log_residual_proposal", np.float64, len(inner) if is_expansion else total
    )
    of_proposal = zip(
        slices(column(arrays, f"{name}_log_proposal", np.float64, total), inner),
        residual.tolist() if is_expansion else slices(residual, inner),
        slices(column(arrays, f"{name}_log_tilt", np.float64, total), inner),
        strict=True,
    )
    names = ("log_proposal", "log_residual_proposal", "log_tilt")
    return [
        dict(zip(names, next(of_proposal), strict=True)) if has_tilt else {}
        for has_tilt in tilted.tolist()
    ]
