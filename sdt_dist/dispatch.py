"""Requests of several kinds: sorted by who answers them, and answered in the order in which they were asked.

See docs/architecture/search.md.

A request says its `kind`; the driver, a searcher's lane and a model server each name who answers which. This module must
not know what any kind means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from sdt_dist.errors import FleetError

Handler = Callable[[list[Any]], Sequence[Any]]


class Kinded(Protocol):
    """A request, or a reply, that says of which kind it is: a literal string of its class."""

    kind: ClassVar[Any]


def dispatch(
    requests: Sequence[Kinded],
    handlers: Mapping[str, Handler],
    owner: str = "model",
) -> list[Any]:
    """The replies to `requests` in their order, by one call of each kind's handler where that kind is asked.

    Handlers are called in the order of `handlers`. `owner` answers for them in errors, which are those of `join`.
    """
    own = {kind: kind for kind in handlers}
    asked = split(requests, own)
    replies = {kind: handlers[kind](some) if some else [] for kind, some in asked.items()}
    return join(requests, own, replies, owner)


def split(requests: Sequence[Kinded], receivers: Mapping[str, str]) -> dict[str, list[Any]]:
    """The requests for each receiver, in their order; none is an empty list. `receivers`: by kind."""
    asked: dict[str, list[Any]] = {receiver: [] for receiver in receivers.values()}
    for request in requests:
        assert request.kind in receivers, f"nobody here answers a request of kind {request.kind!r}"
        asked[receivers[request.kind]].append(request)
    return asked


def join(
    requests: Sequence[Kinded],
    receivers: Mapping[str, str],
    replies: Mapping[str, Sequence[Any]],
    owner: str = "model",
) -> list[Any]:
    """What the receivers of `split` replied, in the order of `requests`.

    FleetError, in the name of `owner`, unless each gave one reply a request.
    """
    for receiver, asked in split(requests, receivers).items():
        if len(replies[receiver]) != len(asked):
            raise FleetError(
                f"{owner}: more or fewer replies than it was asked for ({receiver}: "
                f"{len(replies[receiver])} to {len(asked)} requests); allowed: one each, in their order."
            )
    rest = {receiver: iter(some) for receiver, some in replies.items()}
    return [next(rest[receivers[request.kind]]) for request in requests]
