"""What the model servers of a fleet serve between them: one p, and whether its results repeat bit by bit.

See docs/architecture/search.md, docs/architecture/fleet.md.

Two backends never agree bitwise, not even where each repeats itself, so a fleet of several groups promises seeds only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sdt_dist.errors import FleetError
from sdt_dist.models.card import ModelCard

# the fields of a card that define p; weights have other names in other backends
_P = (
    "kind",
    "vocab_size",
    "spec",
)
_FIX = {
    True: "all nodes of a group must have the same model under the same name.",
    False: "every group must serve the run's own model: give each a copy of it, or take out the group with another one.",
}
_LONGEST_VALUE = 80


class Agreement:
    """The cards of a fleet's servers, by group; `groups` are the groups' names for people."""

    def __init__(self, groups: Sequence[str]) -> None:
        self.deterministic = len(groups) == 1
        self._groups = groups
        self._first: dict[
            int, tuple[str, ModelCard]
        ] = {}  # of each group, the first server's name and card

    def knows(self, group: int) -> bool:
        """Whether a server of the group has said what it serves."""
        return group in self._first

    @property
    def card(self) -> ModelCard | None:
        """What searchers are told: the run's own model, with what holds for every group; None until every group is known.

        Its identity is that of the run's own model, so all walks of a fleet are evidence under one key.
        """
        if len(self._first) < len(self._groups):
            return None
        max_context = min(card.max_context for _, card in self._first.values())
        return replace(self._first[0][1], max_context=max_context, deterministic=self.deterministic)

    @property
    def own(self) -> ModelCard | None:
        """The card of the run's own model, once one of its servers has told it."""
        return self._first[0][1] if 0 in self._first else None

    def add(self, server: str, group: int, card: ModelCard) -> None:
        """Note what a server serves.

        FleetError names both servers, the field and the fix where that is not the others' p, or not for contexts as long
        as its group's.
        """
        other_group = group if self.knows(group) else min(self._first, default=group)
        other, known = self._first.setdefault(other_group, (server, card))
        is_shorter = group == other_group and card.max_context < known.max_context
        found = _difference(
            *(_plain(one, (*_P, "max_context") if is_shorter else _P) for one in (card, known))
        )
        if found is not None:
            field, mine, theirs = found
            raise FleetError(
                f"model servers disagree on {field}: {server} ({self._groups[group]}) has {_short(mine)}, {other} "
                f"({self._groups[other_group]}) has {_short(theirs)}; {_FIX[group == other_group]}"
            )
        _, own = self._first.setdefault(group, (server, card))
        self.deterministic &= card.deterministic and card.identity == own.identity


def _plain(card: ModelCard, fields: Sequence[str]) -> dict[str, Any]:
    """Fields of a card as they arrive over HTTP, where tuples have become lists."""
    values = json.loads(card.to_json())
    return {field: values[field] for field in fields}


def _difference(mine: Any, theirs: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """(field, value, value) of the first innermost difference of two plain values; None where they are equal."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*mine, *theirs]):
            found = _difference(mine.get(key), theirs.get(key), f"{field}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if mine == theirs else (field, mine, theirs)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
