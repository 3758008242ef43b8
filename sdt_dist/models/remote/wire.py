"""Model requests and replies as a few flat numpy arrays, for other processes and machines.

See docs/architecture/fleet.md.

Everything arrives bit by bit and in its order. Sequences are concatenated beside their lengths, each root and each tilt is
sent once (a root without its `meta`), and the forward passes a reply took part in travel as ranges. Must not know Ray, HTTP or models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from sdt_dist.errors import ConfigurationError, ContextError
from sdt_dist.models.remote.columns import (
    Arrays,
    column,
    integers,
    joined,
    lengths,
    malformed,
    pack_lists,
    pack_sets,
    ranges,
    require,
    slices,
    unpack_lists,
    unpack_sets,
)
from sdt_dist.models.remote.wire_tilts import (
    pack_proposals,
    pack_tilts,
    unpack_proposals,
    unpack_tilts,
)
from sdt_dist.protocols import (
    Cost,
    ExpandRequest,
    Expansion,
    ModelReply,
    ModelRequest,
    PriorLaw,
    Rollout,
    RolloutRequest,
    Root,
)

WIRE_VERSION = 3
KINDS = ("expand", "rollout")  # a kind travels as its place here; new ones come last
_REQUESTS = {"expand": ExpandRequest, "rollout": RolloutRequest}
_REPLIES = {"expand": Expansion, "rollout": Rollout}
_LONGEST_DIGEST = 64


def pack_requests(requests: Sequence[ModelRequest], law: PriorLaw) -> Arrays:
    """One message: N requests of both kinds, in order, and the definition of p that they share.

    ConfigurationError for a number that its array cannot hold, ContextError for a prompt that has embeddings.
    """
    if any(request.root.embeddings is not None for request in requests):
        raise ContextError(
            "prompt: it has embeddings, which do not leave their process; give token ids instead."
        )
    names: dict[tuple[bytes, tuple[int, ...], bool], int] = {}
    places: dict[int, int] = {}
    for request in requests:
        root = request.root
        if id(root) not in places:
            places[id(root)] = names.setdefault((root.digest, root.prompt, root.paid), len(names))
    counts = [r.num_tokens if r.kind == "rollout" else r.num_children for r in requests]
    return {
        "law": _pack_law(law),
        "kind": _pack_kinds(requests),
        "root": integers("root", [places[id(r.root)] for r in requests], np.int32),
        "count": integers("num_tokens or num_children", counts, np.int64),
        "has_key": np.array([r.key is not None for r in requests], dtype=np.bool_),
        "key": integers("key", [0 if r.key is None else r.key for r in requests], np.uint64),
        **pack_lists("tokens", [r.tokens for r in requests]),
        **pack_lists("excluded", [r.excluded for r in requests]),
        **pack_lists("prompt", [prompt for _, prompt, _ in names]),
        **pack_lists("digest", [digest for digest, _, _ in names], np.uint8),
        "paid": np.array([paid for _, _, paid in names], dtype=np.bool_),
        **pack_tilts([r.tilt for r in requests]),
    }


def num_rows(arrays: Mapping[str, np.ndarray]) -> int:
    """How many requests or replies a message holds."""
    return len(_kinds(arrays))


def unpack_requests(arrays: Mapping[str, np.ndarray]) -> tuple[list[ModelRequest], PriorLaw]:
    """The requests of a message and their law; equal roots are one object. ConfigurationError when malformed."""
    law = law_of(arrays)
    roots = _roots(arrays)
    kinds = _kinds(arrays)
    size = len(kinds)
    place = column(arrays, "root", np.int32, size)
    has_key = column(arrays, "has_key", np.bool_, size)
    require(
        not size or (place.min() >= 0 and place.max() < len(roots)),
        "root",
        f"0 to {len(roots) - 1}",
    )
    rows = zip(
        kinds,
        place.tolist(),
        unpack_lists(arrays, "tokens", size=size),
        column(arrays, "count", np.int64, size).tolist(),
        has_key.tolist(),
        column(arrays, "key", np.uint64, size).tolist(),
        unpack_lists(arrays, "excluded", size=size),
        unpack_tilts(arrays, size),
        strict=True,
    )
    requests: list[ModelRequest] = [
        _REQUESTS[kind](roots[i], tokens, count, key if keyed else None, excluded, tilt)
        for kind, i, tokens, count, keyed, key, excluded, tilt in rows
    ]
    return requests, law


def check_tokens(arrays: Mapping[str, np.ndarray], vocab_size: int) -> None:
    """ContextError when a message of requests names a token id outside [0, vocab_size)."""
    for name in ("prompt", "tokens", "excluded"):
        ids = column(arrays, name, np.int32)
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
            raise ContextError(f"{name}: token id {bad}, allowed 0 to {vocab_size - 1}.")


def check_counts(arrays: Mapping[str, np.ndarray], most_tokens: int) -> None:
    """ConfigurationError for a rollout of more than `most_tokens` or an expansion without children.

    More children than there are tokens mean all of them.
    """
    is_rollout = np.array([kind == "rollout" for kind in _kinds(arrays)], dtype=np.bool_)
    counts = column(arrays, "count", np.int64, len(is_rollout))
    wrong = counts[np.where(is_rollout, (counts < 0) | (counts > most_tokens), counts < 1)]
    if len(wrong):
        raise ConfigurationError(
            f"request: num_tokens or num_children of {wrong[0]}, allowed 0 to {most_tokens} tokens, 1 or more children."
        )


def law_of(arrays: Mapping[str, np.ndarray]) -> PriorLaw:
    """The law of a message of requests; ConfigurationError when malformed."""
    return _unpack_law(column(arrays, "law", np.uint8).tobytes())


def pack_replies(replies: Sequence[ModelReply]) -> Arrays:
    """One message: N replies of both kinds, in order, log-probs in float64 and token ids in int32."""
    expansions = [reply for reply in replies if reply.kind == "expand"]
    rollouts = [reply for reply in replies if reply.kind == "rollout"]
    reweighted = [e for e in expansions if e.log_weight is not e.log_prob]
    return {
        "kind": _pack_kinds(replies),
        "children_length": integers("children", [len(e.children) for e in expansions], np.int32),
        "children": joined([e.children for e in expansions], np.int32),
        "children_log_prob": joined([e.log_prob for e in expansions], np.float64),
        "has_log_weight": np.array(
            [e.log_weight is not e.log_prob for e in expansions], dtype=np.bool_
        ),
        "log_weight": joined([e.log_weight for e in reweighted], np.float64),
        "log_residual": np.array([e.log_residual for e in expansions], dtype=np.float64),
        "num_remaining": integers("num_remaining", [e.num_remaining for e in expansions], np.int64),
        "steps_length": integers("tokens", [len(r.tokens) for r in rollouts], np.int32),
        "steps": joined([r.tokens for r in rollouts], np.int32),
        "steps_log_prob": joined([r.log_prob for r in rollouts], np.float64),
        "steps_log_residual": joined([r.log_residual for r in rollouts], np.float64),
        "steps_num_remaining": joined([r.num_remaining for r in rollouts], np.int32),
        "ended": np.array([r.finish_reason == "eos" for r in rollouts], dtype=np.bool_),
        **pack_proposals(expansions, rollouts),
        **_pack_costs([reply.cost for reply in replies]),
    }


def unpack_replies(arrays: Mapping[str, np.ndarray], first_call: int = 0) -> list[ModelReply]:
    """The replies of a message, with `first_call` added to the numbers of their forward passes.

    Their arrays are views of the message's. ConfigurationError for anything malformed.
    """
    kinds = _kinds(arrays)
    rest = {
        "expand": _expansions(arrays, kinds.count("expand")),
        "rollout": _rollouts(arrays, kinds.count("rollout")),
    }
    costs = _unpack_costs(arrays, len(kinds), first_call)
    replies: list[ModelReply] = []
    for kind, cost in zip(kinds, costs, strict=True):
        fields, of_proposal = next(rest[kind])
        replies.append(_REPLIES[kind](*fields, cost=cost, **of_proposal))
    return replies


def compact_calls(arrays: Mapping[str, np.ndarray]) -> tuple[Arrays, int]:
    """The same replies with their forward passes numbered 0, 1, ... in order, and how many there are.

    For a caller that took part in some of a server's passes only and counts those as its own.
    """
    starts, stops = ranges(arrays, "call")
    if not len(starts):
        return dict(arrays), 0
    order = np.argsort(starts, kind="stable")
    reached = np.maximum.accumulate(stops[order])
    # where a new range of the union begins
    first = np.append(True, starts[order][1:] > reached[:-1])
    union_start = starts[order][first]
    union_stop = reached[np.append(np.flatnonzero(first)[1:] - 1, len(order) - 1)]
    number = np.append(0, np.cumsum(union_stop - union_start))
    place = np.searchsorted(union_start, starts, side="right") - 1
    shift = number[place] - union_start[place]
    return {**arrays, "call_start": starts + shift, "call_stop": stops + shift}, int(number[-1])


def _pack_kinds(rows: Sequence[ModelRequest] | Sequence[ModelReply]) -> np.ndarray:
    """Kinds [N] uint8 of requests or replies, as places in KINDS."""
    return np.array([KINDS.index(row.kind) for row in rows], dtype=np.uint8)


def _kinds(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The kind of every row of a message. ConfigurationError for one of an earlier version, which had no kinds."""
    if "is_rollout" in arrays:
        raise _another_version("2 or earlier")
    places = column(arrays, "kind", np.uint8)
    known = not len(places) or int(places.max()) < len(KINDS)
    require(known, "kind", f"0 to {len(KINDS) - 1}")
    return [KINDS[place] for place in places.tolist()]


def _another_version(version: object) -> ConfigurationError:
    return ConfigurationError(
        f"message: version {version}, allowed: {WIRE_VERSION}; use one release of sdt everywhere."
    )


def _roots(arrays: Mapping[str, np.ndarray]) -> list[Root]:
    prompts = unpack_lists(arrays, "prompt")
    digests = unpack_lists(arrays, "digest", np.uint8, len(prompts))
    require(
        all(len(digest) <= _LONGEST_DIGEST for digest in digests),
        "digest",
        f"at most {_LONGEST_DIGEST} bytes",
    )
    paid = column(arrays, "paid", np.bool_, len(prompts)).tolist()
    return [
        Root(prompt, bytes(digest), paid=p)
        for prompt, digest, p in zip(prompts, digests, paid, strict=True)
    ]


def _expansions(arrays: Mapping[str, np.ndarray], size: int) -> Iterator[tuple[Any, Any]]:
    """((children, log_prob, log_weight, log_residual, num_remaining), of the proposal) of every expansion."""
    sizes = lengths(arrays, "children_length", size)
    total = int(sizes.sum())
    own = column(arrays, "has_log_weight", np.bool_, size)
    weights = iter(
        slices(column(arrays, "log_weight", np.float64, int(sizes[own].sum())), sizes[own])
    )
    log_probs = slices(column(arrays, "children_log_prob", np.float64, total), sizes)
    fields = zip(
        slices(column(arrays, "children", np.int32, total), sizes),
        log_probs,
        [
            next(weights) if other else same
            for other, same in zip(own.tolist(), log_probs, strict=True)
        ],
        column(arrays, "log_residual", np.float64, size).tolist(),
        column(arrays, "num_remaining", np.int64, size).tolist(),
        strict=True,
    )
    return zip(fields, unpack_proposals(arrays, "children", sizes), strict=True)


def _rollouts(arrays: Mapping[str, np.ndarray], size: int) -> Iterator[tuple[Any, Any]]:
    """((tokens, log_prob, log_residual, num_remaining, finish_reason), of the proposal) of every rollout."""
    sizes = lengths(arrays, "steps_length", size)
    total = int(sizes.sum())
    fields = (
        ("", np.int32),
        ("_log_prob", np.float64),
        ("_log_residual", np.float64),
        ("_num_remaining", np.int32),
    )
    columns = [slices(column(arrays, f"steps{name}", kind, total), sizes) for name, kind in fields]
    reasons = [
        "eos" if ended else "length" for ended in column(arrays, "ended", np.bool_, size).tolist()
    ]
    return zip(
        zip(*columns, reasons, strict=True), unpack_proposals(arrays, "steps", sizes), strict=True
    )


def _pack_costs(costs: Sequence[Cost]) -> Arrays:
    """Counters [N], and which of S sets of calls each cost has; rows of one batch mostly share theirs."""
    sets: dict[frozenset[int], int] = {}
    return {
        "nfe": integers("nfe", [cost.nfe for cost in costs], np.int64),
        "recomputed": integers(
            "recomputed_tokens", [cost.recomputed_tokens for cost in costs], np.int64
        ),
        "call_set": integers(
            "calls", [sets.setdefault(cost.calls, len(sets)) for cost in costs], np.int32
        ),
        **pack_sets("call", list(sets)),
    }


def _unpack_costs(arrays: Mapping[str, np.ndarray], size: int, first_call: int) -> list[Cost]:
    sets = unpack_sets(arrays, "call", first_call)
    place = column(arrays, "call_set", np.int32, size)
    require(
        not size or (place.min() >= 0 and place.max() < len(sets)),
        "call_set",
        f"0 to {len(sets) - 1}",
    )
    nfe = column(arrays, "nfe", np.int64, size)
    recomputed = column(arrays, "recomputed", np.int64, size)
    return [
        Cost(count, sets[i], again)
        for count, i, again in zip(nfe.tolist(), place.tolist(), recomputed.tolist(), strict=True)
    ]


@lru_cache(maxsize=64)
def _pack_law(law: PriorLaw) -> np.ndarray:
    """A law as JSON bytes [n] uint8; Python writes floats so that they read back bit by bit."""
    return np.frombuffer(
        json.dumps({"version": WIRE_VERSION, **asdict(law)}).encode(), dtype=np.uint8
    )


@lru_cache(maxsize=64)
def _unpack_law(text: bytes) -> PriorLaw:
    """The law that JSON describes. ConfigurationError for another version of the wire, or for anything malformed."""
    try:
        values = json.loads(text)
        version = values.pop("version", None)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise malformed("law", f"JSON ({type(error).__name__}: {error})") from error
    if version != WIRE_VERSION:
        raise _another_version(version)
    try:
        law = PriorLaw(
            **{
                **values,
                "allowed": tuple(values["allowed"]),
                "end_tokens": tuple(values["end_tokens"]),
            }
        )
    except (TypeError, KeyError) as error:
        raise malformed("law", f"the fields of a PriorLaw ({error})") from error
    whole = [*law.allowed, *law.end_tokens, *([] if law.top_k is None else [law.top_k])]
    numbers = [law.sampling_temperature, *([] if law.top_p is None else [law.top_p])]
    require(
        len(law.allowed) == 2 and all(type(value) is int for value in whole),
        "law",
        "whole numbers for tokens",
    )
    require(
        all(type(value) in (int, float) for value in numbers),
        "law",
        "numbers for temperature and top_p",
    )
    return law
