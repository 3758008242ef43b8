"""Laws of every LogitsModel behind a real `ModelServer` with several callers at once.

See docs/architecture/search.md.

What a caller is told is what a fresh model says when it is asked for that alone. Nothing here depends on time.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from sdt_dist.models.remote.calls import ModelCall
from sdt_dist.models.remote.wire import ModelReply, ModelRequest, pack_requests, unpack_replies
from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest
from sdt_dist.serving.server import ModelServer

pytestmark = pytest.mark.usefixtures("one_thread")
GIVE_UP_S = 60.0
CLIENTS = 5
MOST_CALLS = 60


class Held:
    """A model whose calls wait until `gate` is open; `begun` says that one has come so far."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.gate = threading.Event()
        self.begun = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> Any:
        self._wait()
        return self._model.expand(requests, law)

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> Any:
        self._wait()
        return self._model.rollout(requests, law)

    def _wait(self) -> None:
        self.begun.set()
        assert self.gate.wait(GIVE_UP_S), "nobody opened the gate"


@asynccontextmanager
async def serving(model: Any, **options: Any) -> AsyncIterator[ModelServer]:
    """A server of a model; whoever hangs is an error."""
    server = ModelServer(model, **options)
    try:
        async with asyncio.timeout(GIVE_UP_S):
            yield server
    finally:
        server.close()


async def ask(
    server: ModelServer, name: str, requests: Sequence[ModelRequest], law: PriorLaw
) -> list[ModelReply]:
    """One call over the wire."""
    answer = await server.answer(ModelCall(name, pack_requests(requests, law), GIVE_UP_S))
    return unpack_replies(answer.packed)


async def at_once(
    server: ModelServer, requests: Sequence[ModelRequest], law: PriorLaw
) -> list[ModelReply]:
    """Every request in a call of its own, all sent before any is answered."""
    calls = [ask(server, f"caller {i}", [request], law) for i, request in enumerate(requests)]
    return [reply for (reply,) in await asyncio.gather(*calls)]


def same(backend: Any, replies: Sequence[ModelReply], wanted: Sequence[ModelReply]) -> list[bool]:
    return [backend.same(have, want) for have, want in zip(replies, wanted, strict=True)]


def test_concurrent_siblings_of_a_new_prefix(backend):
    """Ten callers want ten children of a state that nobody asked for before; its prompt is paid for once."""
    root = backend.root(2)
    prefix = backend.path(backend.make(), root, 3)
    requests = [
        ExpandRequest(root, (*prefix, token), 4, key=50 + i)
        for i, token in enumerate(backend.tokens(10))
    ]

    async def main():
        async with serving(backend.make()) as server:
            return await at_once(server, requests, backend.law), server.counters

    replies, counters = asyncio.run(main())
    assert all(same(backend, replies, backend.alone(requests)))
    assert sum(reply.cost.nfe for reply in replies) == counters.nfe <= len(requests) + 1
    assert counters.calls == len(requests)


def test_cached_prefixes_meet_the_same_suffix_at_once(backend):
    """Two prefixes in each of two problems were computed before; four callers continue them by the same tokens."""
    suffix = backend.path(backend.make(), backend.root(0), 3)
    starts = [(backend.root(i), (token, *suffix)) for i in (0, 1) for token in backend.tokens(2)]
    requests = [
        RolloutRequest(root, tokens, 2, key=8 + i) for i, (root, tokens) in enumerate(starts)
    ]

    async def main():
        async with serving(backend.make()) as server:
            for i, (root, tokens) in enumerate(starts):
                await ask(server, f"before {i}", [ExpandRequest(root, tokens, 1)], backend.law)
            return await at_once(server, requests, backend.law)

    assert all(same(backend, asyncio.run(main()), backend.alone(requests)))


def test_nobody_starves_among_steady_arrivals(backend):
    """First requests of three newcomers while five clients call without a pause, in batches of at most three rows.

    One shares the clients' law, one has its own, one asks for more rows than a batch has. Counted are, for every call,
    those that arrive after it and are answered before it.
    """
    known = [backend.root(i) for i in (0, 1)]
    new = [backend.root(i) for i in (2, 3, 4)]
    newcomers = [
        ([RolloutRequest(new[0], (), 2, key) for key in (1, 2)], backend.law),
        ([RolloutRequest(new[1], (), 2, 3)], replace(backend.law, sampling_temperature=2.0)),
        ([ExpandRequest(new[2], (token,), 2) for token in backend.tokens(4)], backend.law),
    ]

    async def main():
        arrivals = itertools.count()
        answered = []
        steady = asyncio.Event()
        over = asyncio.Event()

        async def call(
            name: str, requests: Sequence[ModelRequest], law: PriorLaw
        ) -> list[ModelReply]:
            number = next(arrivals)
            replies = await ask(server, name, requests, law)
            answered.append(number)
            if len(answered) == 2 * CLIENTS:
                steady.set()
            return replies

        async def client(number: int) -> bool:
            """Whether it called to the end."""
            for i in range(MOST_CALLS):
                if over.is_set():
                    return True
                request = RolloutRequest(known[number % 2], (), 2, 100 * number + i)
                await call(f"client {number}, {i}", [request], backend.law)
            return False

        async with serving(backend.make(), max_rows=3) as server:
            clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
            await steady.wait()
            told = await asyncio.gather(
                *(call(f"newcomer {i}", *asked) for i, asked in enumerate(newcomers))
            )
            over.set()
            return told, answered, await asyncio.gather(*clients)

    told, answered, without_a_pause = asyncio.run(main())
    overtaking = [
        sum(later > call for later in answered[:place]) for place, call in enumerate(answered)
    ]
    assert max(overtaking) <= 2 * (CLIENTS + len(newcomers))
    for replies, (requests, law) in zip(told, newcomers, strict=True):
        assert all(same(backend, replies, backend.alone(requests, law)))
    assert all(without_a_pause)


def test_a_cancelled_caller_disturbs_nobody(backend):
    """Two of six callers go: one while its batch runs, one while it waits. Their names can be asked for again."""
    roots = [backend.root(i % 2) for i in range(6)]
    requests = [
        RolloutRequest(root, (), 3, key=70 + i)
        if i % 2
        else ExpandRequest(root, (backend.tokens(6)[i],), 3)
        for i, root in enumerate(roots)
    ]
    gone = [1, 4]
    later = RolloutRequest(backend.root(2), (), 3, key=9)

    async def main():
        model = Held(backend.make())

        def send(i: int) -> Any:
            return ask(server, f"caller {i}", [requests[i]], backend.law)

        async with serving(model) as server:
            try:
                callers = [asyncio.create_task(send(i)) for i in range(3)]
                assert await asyncio.to_thread(model.begun.wait, GIVE_UP_S)
                callers += [asyncio.create_task(send(i)) for i in range(3, 6)]
                await asyncio.sleep(0)
                for i in gone:
                    callers[i].cancel()
                await asyncio.sleep(0)
            finally:
                model.gate.set()
            outcomes = await asyncio.gather(*callers, return_exceptions=True)
            again = [(await send(i))[0] for i in gone]
            return outcomes, again, await ask(server, "later", [later], backend.law)

    outcomes, again, after = asyncio.run(main())
    wanted = backend.alone([*requests, later])
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [
        i in gone for i in range(6)
    ]
    stayed = [i for i in range(6) if i not in gone]
    assert all(same(backend, [outcomes[i][0] for i in stayed], [wanted[i] for i in stayed]))
    assert all(same(backend, again, [wanted[i] for i in gone]))
    assert all(same(backend, after, wanted[6:]))


def test_eviction_while_callers_continue_different_prefixes(backend):
    """Four callers go on from what they were told, each along its own sequence; the caches hold next to nothing."""

    async def walk(server: ModelServer, number: int) -> list[tuple[ModelRequest, ModelReply]]:
        root = backend.root(number % 2)
        tokens = ()
        steps = []
        while len(tokens) < backend.max_new and not set(tokens) & set(backend.law.end_tokens):
            count = min(3, backend.max_new - len(tokens))
            asked = [
                RolloutRequest(root, tokens, count, key=1000 * number + len(tokens)),
                ExpandRequest(root, tokens, 3),
            ]
            told = await ask(server, f"{number} at {len(tokens)}", asked, backend.law)
            steps += zip(asked, told, strict=True)
            tokens = (*tokens, *told[0].tokens.tolist())
        return steps

    async def main():
        async with serving(backend.make(cache_bytes=2000)) as server:
            return await asyncio.gather(*(walk(server, number) for number in range(4)))

    walks = asyncio.run(main())
    roomy = backend.make()
    for request, reply in itertools.chain(*walks):
        again = roomy.rollout if isinstance(request, RolloutRequest) else roomy.expand
        assert all(same(backend, [reply], again([request], backend.law))), request
