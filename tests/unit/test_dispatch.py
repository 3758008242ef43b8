"""Requests of several kinds: one call a kind, replies in the order asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdt_dist.dispatch import dispatch, join, split
from sdt_dist.errors import FleetError
from sdt_dist.protocols import ExpandRequest, RolloutRequest, Root
from sdt_dist.search.session import ScoreRequest
from sdt_dist.values.records import ShareRequest


@dataclass(frozen=True)
class _Odd:
    number: int
    kind: ClassVar[str] = "odd"


@dataclass(frozen=True)
class _Even:
    number: int
    kind: ClassVar[str] = "even"


REQUESTS = st.lists(st.integers(0, 99).map(lambda n: _Odd(n) if n % 2 else _Even(n)))


@given(REQUESTS)
def test_replies_come_in_the_order_asked_by_one_call_a_kind(requests):
    calls: list[tuple[str, int]] = []

    def handler(kind):
        def answer(asked):
            assert asked and all(request.kind == kind for request in asked)
            calls.append((kind, len(asked)))
            return [request.number for request in asked]

        return answer

    replies = dispatch(requests, {kind: handler(kind) for kind in ("even", "odd")})
    assert replies == [request.number for request in requests]
    counts = {kind: [r.kind for r in requests].count(kind) for kind in ("even", "odd")}
    assert calls == [(kind, count) for kind, count in counts.items() if count]


@given(REQUESTS)
def test_kinds_with_one_receiver_stay_in_their_order(requests):
    receivers = {"odd": "all", "even": "all", "rest": "nobody"}
    asked = split(requests, receivers)
    assert asked == {"all": requests, "nobody": []}
    assert join(requests, receivers, asked) == requests


@pytest.mark.parametrize("replies", [[], [1], [1, 2, 3]])
def test_more_or_fewer_replies_are_an_error_in_the_owners_name(replies):
    with pytest.raises(FleetError, match=rf"server-7: .*odd: {len(replies)} to 2 requests"):
        dispatch([_Odd(1), _Odd(3)], {"odd": lambda asked: replies}, "server-7")


def test_a_kind_that_nobody_answers_is_a_bug():
    with pytest.raises(AssertionError, match="'even'"):
        dispatch([_Even(2)], {"odd": list})


def test_every_request_says_its_kind_and_whether_one_pass_answers_it():
    root = Root((1,), b"")
    asked = [
        ExpandRequest(root, (), 3),
        RolloutRequest(root, (), 1, 0),
        RolloutRequest(root, (), 2, 0),
        ShareRequest("key", "team"),
        ScoreRequest([]),
    ]
    assert [request.kind for request in asked] == ["expand", "rollout", "rollout", "share", "score"]
    assert [request.is_single_step for request in asked] == [True, True, False, True, False]
