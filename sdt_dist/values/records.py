"""The nouns of shared evidence: a finished walk, what is asked of a store and what it answers.

See docs/concepts/exactness.md#shared-evidence.

This module must not know trees, estimates, files or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np

from sdt_dist.errors import ConfigurationError

Vector = Mapping[str, int]  # how many walks of each stream: those numbered 0 .. count - 1


@dataclass(frozen=True, slots=True, eq=False)
class WalkRecord:
    """One finished residual_ts walk, from which everything about it can be derived under any reward multipliers.

    stream: "team/searcher/incarnation", written by one process in the order of `number` = 0, 1, ...; the team names a
    run and a problem. ticket: the walk's place in its searcher's share of the team's budget.
    tokens [n] int32: the finished sequence, end token included. log_prob [n]: log p of each. log_outside [n]: log of
    the prior mass outside each token, summed over the other tokens. support [n] int32: tokens with p > 0 in each row.
    components: raw reward terms by name, without multipliers. log_omega: log p/q of the walk (docs/concepts/exactness.md).
    known: the walks that were in its tree, its own stream's included. noise: the key of its randomness; walks that
    share one are correlated. nfe: next-token distributions that it computed.
    """

    stream: str
    number: int
    ticket: int
    tokens: np.ndarray
    log_prob: np.ndarray
    log_outside: np.ndarray
    support: np.ndarray
    components: Mapping[str, float]
    log_omega: float
    known: Vector
    noise: int
    nfe: int = 0

    @property
    def team(self) -> str:
        """The run and problem that the walk was made for."""
        return self.stream.rsplit("/", 2)[0]

    @property
    def searcher(self) -> int:
        return int(self.stream.rsplit("/", 2)[1])

    @property
    def incarnation(self) -> int:
        return int(self.stream.rsplit("/", 2)[2])

    @property
    def sequence(self) -> tuple[int, ...]:
        """The finished token sequence, hashable."""
        return tuple(self.tokens.tolist())

    @property
    def num_bytes(self) -> int:
        """About what the record takes in memory; its vector is shared with others and not counted."""
        arrays = (self.tokens, self.log_prob, self.log_outside, self.support)
        return (
            sum(array.nbytes for array in arrays) + 64 * (len(self.components) + len(arrays)) + 128
        )


def stream_name(team: str, searcher: int, incarnation: int) -> str:
    """The name of the stream that one incarnation of a team's searcher writes."""
    return f"{team}/{searcher}/{incarnation}"


@dataclass(frozen=True, slots=True)
class Membership:
    """Which member of a problem's team a search is, and the evidence it starts from.

    key: of the problem's evidence (`values.keys`). team: a name of the run and the problem that no other run uses, so
    that streams never repeat. searcher: 0 .. searchers - 1. incarnation: how often this searcher was started again
    after a crash. warm: walks of earlier teams under the same key, closed under what their vectors name, in causal
    order, and the same for every member: they are fixed before the team's first walk.
    """

    key: str
    team: str
    searcher: int = 0
    searchers: int = 1
    incarnation: int = 0
    warm: tuple[WalkRecord, ...] = ()

    @property
    def stream(self) -> str:
        """The stream that this search writes."""
        return stream_name(self.team, self.searcher, self.incarnation)


@dataclass(frozen=True, slots=True)
class TeamReport:
    """What a member's result rests on: `missing` searchers whose shares it has not seen whole (none: it is complete).

    stream: the member's own. paid: (walks, nfe) that it saw of each stream of its team.
    """

    stream: str
    missing: tuple[int, ...]
    paid: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ShareRequest:
    """Publish walks under a key and get back those that the asker does not know: one exchange with a store.

    known: all that is in the asker's tree. team: walks of this team are returned, of others none. closed: streams that
    write no more, with their final length, as far as the asker knows. The answer is a `Shared`.
    """

    kind: ClassVar[Literal["share"]] = "share"
    is_single_step: ClassVar[bool] = True  # no forward pass at all

    key: str
    team: str
    publish: tuple[WalkRecord, ...] = ()
    known: Vector = field(default_factory=dict)
    closed: Vector = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shared:
    """A store's answer: the team's visible walks that the asker lacks, each after all that its vector names.

    held: visible walks of every stream under the key, what this exchange published included. Where it is less than the
    asker knows (a store that lost walks), the asker publishes again all that is missing, others' walks included.
    closed: streams of the team that write no more, with their final length.
    """

    walks: tuple[WalkRecord, ...]
    held: Vector
    closed: Vector


class ValueStore(Protocol):
    """Where searches exchange evidence; see `values.store` for the contract and the local implementation."""

    def exchange(self, requests: Sequence[ShareRequest]) -> list[Shared]:
        """Publish everything that is given, then answer each request, in the order they were asked."""
        ...

    def soft_values(
        self,
        key: str,
        prefixes: Sequence[tuple[int, ...]],
        inverse_temperature: float,
        multipliers: Mapping[str, float],
    ) -> np.ndarray:
        """Estimates v [B] of token prefixes from the visible walks, under any multipliers and lambda."""
        ...


def covers(held: Vector, known: Vector) -> bool:
    """Whether all that `known` names is held."""
    return all(held.get(stream, 0) >= count for stream, count in known.items())


def reward_of(components: Mapping[str, float], multipliers: Mapping[str, float]) -> float:
    """sum of multiplier * term, in the order of `rewards.checking.weighted_sum` and so with its bits.

    ConfigurationError when the terms are not the multipliers'.
    """
    if components.keys() != multipliers.keys():
        raise ConfigurationError(
            f"evidence: its walks have the reward terms {sorted(components)}, this reward has {sorted(multipliers)}; "
            "walks of another reward have another evidence key."
        )
    total = 0.0
    for name, weight in multipliers.items():
        total = total + weight * components[name]
    return total
