"""Checked flat columns of a message: whole numbers, ragged lists, sets of integers as ranges.

See docs/architecture/fleet.md.

Whatever arrives from outside is refused with ConfigurationError before use. It must not know what a message means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise

import numpy as np

from sdt_dist.errors import ConfigurationError

Arrays = dict[str, np.ndarray]
_MOST_IN_SETS = 1 << 26  # far beyond any message; more is damage, and would fill the memory


def malformed(name: str, allowed: str) -> ConfigurationError:
    """The error for a column that no message of ours has."""
    return ConfigurationError(f"message: its {name!r} is malformed; allowed: {allowed}.")


def require(holds: bool | np.bool_, name: str, allowed: str) -> None:
    """Raise `malformed` unless `holds`."""
    if not holds:
        raise malformed(name, allowed)


def column(
    arrays: Mapping[str, np.ndarray], name: str, kind: type[np.generic], size: int | None = None
) -> np.ndarray:
    """The array [size] of a message, of this very dtype."""
    length = "" if size is None else f" of length {size}"
    allowed = f"{np.dtype(kind).name} in one dimension{length}"
    array = arrays.get(name)
    if not isinstance(array, np.ndarray):
        raise malformed(name, f"{allowed}; found: none")
    is_column = array.ndim == 1 and array.dtype == kind
    if not is_column or (size is not None and len(array) != size):
        raise malformed(name, f"{allowed}; found: {array.dtype} of shape {array.shape}")
    return array


def lengths(arrays: Mapping[str, np.ndarray], name: str, size: int | None = None) -> np.ndarray:
    """A column [size] int32 of numbers that are not negative."""
    found = column(arrays, name, np.int32, size)
    require(not len(found) or found.min() >= 0, name, "not negative")
    return found


def integers(name: str, values: list[int], kind: type[np.integer]) -> np.ndarray:
    """A column of whole numbers; ConfigurationError, naming it, when one does not fit."""
    try:
        return np.array(values, dtype=kind)
    except OverflowError as error:
        raise ConfigurationError(
            f"{name}: a number does not fit {kind.__name__} ({error})."
        ) from error


def joined(arrays: Sequence[np.ndarray], kind: type[np.generic]) -> np.ndarray:
    """Arrays one after another."""
    return np.concatenate(arrays, dtype=kind) if arrays else np.empty(0, dtype=kind)


def slices(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """What `joined` put together: views of `values`."""
    return [values[start:stop] for start, stop in pairwise(_bounds(sizes))]


def pack_lists(
    name: str, lists: Sequence[Sequence[int]], kind: type[np.integer] = np.int32
) -> Arrays:
    """Lists of whole numbers as two columns: all of them, and their lengths."""
    numbers = list(chain.from_iterable(lists))
    sizes = [len(one) for one in lists]
    return {
        name: integers(name, numbers, kind),
        f"{name}_length": integers(name, sizes, np.int32),
    }


def unpack_lists(
    arrays: Mapping[str, np.ndarray],
    name: str,
    kind: type[np.integer] = np.int32,
    size: int | None = None,
) -> list[tuple[int, ...]]:
    """The lists that `pack_lists` packed, as tuples; there must be `size` of them."""
    sizes = lengths(arrays, f"{name}_length", size)
    values = column(arrays, name, kind, int(sizes.sum())).tolist()
    return [tuple(values[start:stop]) for start, stop in pairwise(_bounds(sizes))]


def pack_sets(name: str, sets: Sequence[frozenset[int]]) -> Arrays:
    """S sets of numbers >= 0 as ranges: `_runs` [S] of them a set, each from `_start` up to before `_stop`."""
    # 1. All numbers, sorted within their sets.
    numbers = integers(name, list(chain.from_iterable(sets)), np.int64)
    sizes = [len(members) for members in sets]
    owner = np.repeat(np.arange(len(sets)), sizes)
    numbers = numbers[np.lexsort((numbers, owner))]
    # 2. A range begins wherever a number does not follow the one before, or a set ends.
    skips = np.diff(numbers) != 1
    changes = np.diff(owner) != 0
    begins = np.ones(len(numbers), dtype=np.bool_)
    begins[1:] = skips | changes
    ends = np.append(begins[1:], True)[: len(numbers)]
    runs = np.bincount(owner[begins], minlength=len(sets))
    return {
        f"{name}_runs": runs.astype(np.int32),
        f"{name}_start": numbers[begins],
        f"{name}_stop": numbers[ends] + 1,
    }


def unpack_sets(
    arrays: Mapping[str, np.ndarray], name: str, shift: int = 0
) -> list[frozenset[int]]:
    """The sets that `pack_sets` packed, `shift` added to every number."""
    runs = lengths(arrays, f"{name}_runs")
    starts, stops = ranges(arrays, name, int(runs.sum()))
    members = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        members.append(range(start + shift, stop + shift))
    found = []
    for begin, end in pairwise(_bounds(runs)):
        found.append(frozenset(chain.from_iterable(members[begin:end])))
    return found


def ranges(
    arrays: Mapping[str, np.ndarray], name: str, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The bounds [size] of the ranges of `pack_sets`, each with 0 <= start < stop."""
    starts = column(arrays, f"{name}_start", np.int64, size)
    stops = column(arrays, f"{name}_stop", np.int64, len(starts))
    rises = (starts >= 0) & (starts < stops)
    require(rises.all(), f"{name}_stop", "above a start >= 0")
    sizes = stops - starts
    each_is_small = bool((sizes <= _MOST_IN_SETS).all())  # so that their sum does not overflow
    few = each_is_small and int(sizes.sum()) <= _MOST_IN_SETS
    require(few, f"{name}_stop", f"at most {_MOST_IN_SETS} numbers")
    return starts, stops


def _bounds(sizes: np.ndarray) -> list[int]:
    return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
