"""Requests and replies as flat arrays: they arrive bit by bit, and nothing malformed gets past."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

from sdt_dist.errors import ConfigurationError, ContextError
from sdt_dist.models.remote.wire import (
    check_tokens,
    compact_calls,
    num_rows,
    pack_replies,
    pack_requests,
    unpack_replies,
    unpack_requests,
)
from sdt_dist.protocols import (
    Cost,
    ExpandRequest,
    Expansion,
    PriorLaw,
    Rollout,
    RolloutRequest,
    Root,
    Tilt,
)

WIRE_2 = Path(__file__).parent.parent / "golden" / "files" / "wire2.npz"
INT32 = st.integers(0, 2**31 - 1)
TOKENS = st.lists(INT32, max_size=6).map(tuple)
KEYS = st.none() | st.integers(0, 2**64 - 1)
ROOTS = st.builds(Root, TOKENS, st.binary(max_size=20))
FLOATS = st.floats(width=64)
TILTS = st.none() | st.builds(
    Tilt,
    st.text(max_size=9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from("pq"),
)
CALLS = st.frozensets(st.integers(0, 40), max_size=12) | st.frozensets(
    st.integers(0, 2**62), max_size=3
)
COSTS = st.builds(Cost, st.integers(0, 2**40), CALLS, st.integers(0, 2**40))
LAWS = st.builds(
    PriorLaw, st.tuples(INT32, INT32), TOKENS, FLOATS.filter(lambda x: not math.isnan(x)), st.none() | INT32,
    st.none() | st.floats(0, 1),
)  # fmt: skip


@st.composite
def requests(draw):
    roots = draw(st.lists(ROOTS, min_size=1, max_size=3))
    build = [
        st.builds(ExpandRequest, st.sampled_from(roots), TOKENS, INT32, KEYS, TOKENS, TILTS),
        st.builds(RolloutRequest, st.sampled_from(roots), TOKENS, INT32, KEYS, TOKENS, TILTS),
    ]
    return draw(st.lists(st.one_of(build), max_size=8))


@st.composite
def replies(draw):
    def floats(size: int) -> np.ndarray:
        return draw(hnp.arrays(np.float64, size, elements=FLOATS))

    def counts(size: int) -> np.ndarray:
        return draw(hnp.arrays(np.int32, size))

    found: list[Expansion | Rollout] = []
    for _ in range(draw(st.integers(0, 6))):
        size = draw(st.integers(0, 5))
        cost = draw(COSTS)
        is_tilted = draw(st.booleans())
        if draw(st.booleans()):
            log_prob = floats(size)
            log_weight = log_prob if draw(st.booleans()) else floats(size)
            of_proposal = (floats(size), draw(FLOATS), floats(size)) if is_tilted else ()
            found.append(
                Expansion(
                    counts(size),
                    log_prob,
                    log_weight,
                    draw(FLOATS),
                    draw(INT32),
                    cost,
                    *of_proposal,
                )
            )
        else:
            reason = draw(st.sampled_from(["eos", "length"]))
            of_proposal = (floats(size), floats(size), floats(size)) if is_tilted else ()
            found.append(
                Rollout(
                    counts(size),
                    floats(size),
                    floats(size),
                    counts(size),
                    reason,
                    cost,
                    *of_proposal,
                )
            )
    return found


def bits(value):
    """A record's fields in a form that is equal only when every bit is."""
    if isinstance(value, Root):
        return value.prompt, value.digest
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return np.float64(value).tobytes()
    if isinstance(value, (ExpandRequest, RolloutRequest, Expansion, Rollout)):
        return type(value), [bits(getattr(value, field.name)) for field in fields(value)]
    return value


def through_safetensors(arrays):
    return load(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


@settings(deadline=None)
@given(requests(), LAWS)
def test_requests_arrive_as_they_were(asked, law):
    packed = pack_requests(asked, law)
    for arrays in (packed, through_safetensors(packed), pickle.loads(pickle.dumps(packed, 5))):
        found, found_law = unpack_requests(arrays)
        assert [bits(r) for r in found] == [bits(r) for r in asked]
        assert found_law == law
        assert num_rows(arrays) == len(asked)


@settings(deadline=None)
@given(replies(), st.integers(0, 2**60))
def test_replies_arrive_bit_by_bit_with_their_calls_shifted(given_replies, first_call):
    packed = pack_replies(given_replies)
    assert [bits(r) for r in unpack_replies(through_safetensors(packed))] == [
        bits(r) for r in given_replies
    ]
    for found, reply in zip(unpack_replies(packed, first_call), given_replies, strict=True):
        assert found.cost.calls == {call + first_call for call in reply.cost.calls}
        assert (found.cost.nfe, found.cost.recomputed_tokens) == (
            reply.cost.nfe,
            reply.cost.recomputed_tokens,
        )


@settings(deadline=None)
@given(st.lists(st.builds(Cost, st.just(1), CALLS, st.just(0)), max_size=6))
def test_compact_calls_number_the_union_in_order(costs):
    empty = np.empty(0)
    packed, count = compact_calls(
        pack_replies([Expansion(np.empty(0, np.int32), empty, empty, 0.0, 0, c) for c in costs])
    )
    union = sorted(frozenset().union(*(cost.calls for cost in costs)))
    place = {call: number for number, call in enumerate(union)}
    assert count == len(union)
    for found, cost in zip(unpack_replies(packed), costs, strict=True):
        assert found.cost.calls == {place[call] for call in cost.calls}


def test_a_root_is_sent_once_and_its_meta_never():
    root = Root((1, 2, 3), b"0" * 16, meta=object())
    twin = Root((1, 2, 3), b"0" * 16)
    packed = pack_requests(
        [RolloutRequest(r, (), 4, 5) for r in (root, twin, root)], PriorLaw((0, 9))
    )
    found, _ = unpack_requests(packed)
    assert packed["prompt"].tolist() == [1, 2, 3]
    assert all(request.root is found[0].root for request in found)
    assert found[0].root.meta is None and not found[0].root.paid
    (later,), _ = unpack_requests(
        pack_requests([RolloutRequest(replace(root, paid=True), (), 4, 5)], PriorLaw((0, 9)))
    )
    assert later.root.paid


def test_equal_log_weights_are_sent_once():
    log_prob = np.zeros(3)
    shared = Expansion(np.arange(3, dtype=np.int32), log_prob, log_prob, 0.0, 1)
    own = Expansion(np.arange(3, dtype=np.int32), log_prob, np.ones(3), 0.0, 1)
    packed = pack_replies([shared, own])
    first, second = unpack_replies(packed)
    assert len(packed["log_weight"]) == 3
    assert first.log_weight is first.log_prob
    assert second.log_weight.tolist() == [1, 1, 1]


def _messages():
    root = Root((1, 2), b"0" * 16)
    tilt = Tilt("flow/1", 2.0, "q")
    asked = [ExpandRequest(root, (3,), 2, 7, (4,), tilt), RolloutRequest(root, (), 3, None)]
    log_prob = np.zeros(2)
    children = np.array([1, 2], np.int32)
    counts = np.array([1, 2], np.int32)
    cost = Cost(1, frozenset({3, 4, 9}))
    of_proposal = (log_prob, -1.0, log_prob)
    answered = [
        Expansion(children, log_prob, np.ones(2), -1.0, 4, cost, *of_proposal),
        Rollout(children, log_prob, log_prob, counts, "eos", Cost(2), log_prob, log_prob, log_prob),
    ]
    return [
        (pack_requests(asked, PriorLaw((0, 9))), unpack_requests),
        (pack_replies(answered), unpack_replies),
    ]


@pytest.mark.parametrize("message", [0, 1])
def test_a_damaged_message_is_refused_and_never_crashes(message):
    """Every column missing, of another dtype or shape, cut, grown, negative or huge."""
    arrays, unpack = _messages()[message]
    damages = [
        lambda a: None,
        lambda a: "text",
        lambda a: a.astype(np.float32),
        lambda a: a[None],
        lambda a: a[:-1],
        lambda a: np.concatenate([a, a[:1]]),
        lambda a: np.full_like(a, -1) if a.dtype.kind in "if" else np.full_like(a, 255),
        lambda a: (
            np.full_like(a, np.iinfo(a.dtype).max) if a.dtype.kind in "iu" else ~a.view(np.uint8)
        ),
    ]
    refused = 0
    for name, array in arrays.items():
        for damage in damages:
            try:
                unpack({**arrays, name: damage(array)})
            except ConfigurationError:
                refused += 1
    assert refused > 5 * len(arrays)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"version": 3}',
        b'{"version": 3, "allowed": 3, "end_tokens": []}',
        b'{"version": 3, "allowed": [0, 1, 2], "end_tokens": []}',
        b'{"version": 3, "allowed": [0, 1.5], "end_tokens": []}',
        b'{"version": 3, "allowed": [0, 9], "end_tokens": [], "top_k": "x"}',
        b'{"version": 3, "allowed": [0, 9], "end_tokens": [], "sampling_temperature": null}',
        b'{"version": 3, "allowed": [0, 9], "end_tokens": [], "surprise": 1}',
    ],
)
def test_a_malformed_law_is_refused(text):
    arrays = {**_messages()[0][0], "law": np.frombuffer(text, np.uint8)}
    with pytest.raises(ConfigurationError, match="law"):
        unpack_requests(arrays)


def test_another_version_is_named():
    text = b'{"version": 99, "allowed": [0, 9], "end_tokens": []}'
    with pytest.raises(ConfigurationError, match="version 99, allowed: 3"):
        unpack_requests({**_messages()[0][0], "law": np.frombuffer(text, np.uint8)})


@pytest.mark.parametrize(
    ("message", "unpack", "version"),
    [
        ("requests", unpack_requests, "version 2, allowed: 3"),
        ("requests", num_rows, "version 2 or earlier, allowed: 3"),
        ("replies", unpack_replies, "version 2 or earlier, allowed: 3"),
    ],
)
def test_messages_of_version_2_are_refused_in_words(message, unpack, version):
    """What the release before kinds packed: an expansion and a rollout, and the replies to them."""
    with np.load(WIRE_2) as file:
        arrays = {
            name.removeprefix(f"{message}/"): array
            for name, array in file.items()
            if name.startswith(message)
        }
    with pytest.raises(ConfigurationError, match=f"{version}; use one release of sdt everywhere"):
        unpack(arrays)


def test_a_kind_that_nobody_knows_is_refused():
    for arrays, unpack in _messages():
        kinds = np.full_like(arrays["kind"], 2)
        with pytest.raises(ConfigurationError, match="'kind' is malformed; allowed: 0 to 1"):
            unpack({**arrays, "kind": kinds})


def test_numbers_that_do_not_fit_and_foreign_tokens_are_named():
    root = Root((1, 2), b"")
    with pytest.raises(ConfigurationError, match="key"):
        pack_requests([RolloutRequest(root, (), 1, 2**64)], PriorLaw((0, 9)))
    with pytest.raises(ConfigurationError, match="tokens"):
        pack_requests([RolloutRequest(root, (2**31,), 1, 0)], PriorLaw((0, 9)))
    for request in (RolloutRequest(root, (9,), 1, 0), RolloutRequest(Root((-1,), b""), (), 1, 0)):
        with pytest.raises(ContextError, match="allowed 0 to 8"):
            check_tokens(pack_requests([request], PriorLaw((0, 9))), 9)
