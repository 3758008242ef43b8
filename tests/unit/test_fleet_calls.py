"""A searcher's calls: retries, failover, suspicion, deadlines, and the seam under them.

See docs/architecture/fleet.md.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from sdt_dist.actors.calls import (
    Directory,
    RemoteModel,
    Routes,
    ServerCalls,
    ServersDiedError,
    StoreCalls,
)
from sdt_dist.actors.endpoint import (
    Endpoint,
    GoneError,
    UnreachableError,
    repeat_while_unreachable,
    within,
)
from sdt_dist.errors import FleetError
from sdt_dist.models.card import card_of
from sdt_dist.models.remote.calls import BusyError
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import Root
from sdt_dist.serving.server import ModelServer
from sdt_dist.values.records import ShareRequest
from tests.fleet_helpers import LAW, TOY, Clock, MortalEndpoint, toy_requests, toy_tokens


class Scripted(Endpoint):
    """A model server that fails as its script says and answers when that is over."""

    def __init__(self, name: str, *script: Exception, incarnation: int = 0) -> None:
        super().__init__(name, incarnation)
        self.script = list(script)
        self.calls = []
        self.server = ModelServer(Toy(*TOY), name=name)

    async def call(self, method, *arguments, timeout_s):
        self.calls.append(arguments[0].name)
        if self.script:
            raise self.script.pop(0)
        return await within(
            getattr(self.server, method)(*arguments), timeout_s, f"{method} of {self.name}"
        )


def _calls(*servers: Endpoint, timeout_s: float = 20.0, run):
    """The result of `run(calls, directory)` of one crew that may use these servers."""

    async def main():
        directory = Directory()
        await directory.update(Routes(servers, (0,)))
        return await run(ServerCalls("me", 0, directory, LAW, timeout_s), directory)

    return asyncio.run(main())


def _names(replies) -> list[list[int]]:
    return [reply.tokens.tolist() for reply in replies[0]]


def test_a_dead_server_is_replaced_and_not_called_again_until_its_next_incarnation():
    dead = Scripted("model-server-0", GoneError("killed"))
    other = Scripted("model-server-1")
    again = Scripted("model-server-0", incarnation=1)

    async def run(calls, directory):
        first = [_names(await calls.call(toy_requests(n))) for n in (1, 2)]
        await directory.update(Routes((again, other), (0,), version=1))
        return [*first, _names(await calls.call(toy_requests(3)))]

    assert _calls(dead, other, run=run) == [toy_tokens(1), toy_tokens(2), toy_tokens(3)]
    assert (len(dead.calls), len(other.calls), len(again.calls)) == (1, 2, 1)


def test_servers_that_keep_dying_on_a_call_end_it():
    servers = [Scripted(f"model-server-{i}", GoneError(f"death {i}")) for i in range(4)]

    async def run(calls, directory):
        with pytest.raises(
            ServersDiedError, match=r"3 model servers died on 2 requests \(death 2\)"
        ):
            await calls.call(toy_requests(1))

    _calls(*servers, run=run)
    assert [len(server.calls) for server in servers] == [1, 1, 1, 0]


def test_a_busy_or_unreachable_server_is_asked_again_under_the_same_name():
    server = Scripted(
        "model-server-0", BusyError("full"), UnreachableError("lost"), BusyError("full")
    )

    async def run(calls, directory):
        begin = asyncio.get_running_loop().time()
        found = _names(await calls.call(toy_requests(1)))
        return found, asyncio.get_running_loop().time() - begin

    found, waited_s = _calls(server, run=run)
    assert found == toy_tokens(1)
    assert len(server.calls) == 4 and len(set(server.calls)) == 1
    assert waited_s >= 0.05 + 0.1 + 0.2, "the pauses double"


@pytest.mark.parametrize(
    ("servers", "error", "words"),
    [
        ((), FleetError, "a model server that can be called"),
        (
            [Scripted("model-server-0", *[BusyError("model-server-0: full")] * 9)],
            BusyError,
            "model-server-0: full",
        ),
    ],
)
def test_a_call_ends_at_its_deadline_and_says_what_it_waited_for(servers, error, words):
    async def run(calls, directory):
        with pytest.raises(error, match=words):
            await calls.call(toy_requests(1))

    _calls(*servers, timeout_s=0.3, run=run)


def test_a_server_that_never_answers_is_named_while_it_is_waited_for_and_at_the_deadline():
    class Silent:
        async def answer(self, call):
            await asyncio.Event().wait()

    async def run(calls, directory):
        task = asyncio.create_task(calls.call(toy_requests(1)))
        while not calls.waits_for:
            await asyncio.sleep(0)
        assert calls.waits_for == "2 requests at model-server-5"
        with pytest.raises(FleetError, match="waited 1 s for answer of model-server-5"):
            await task

    silent = Scripted("model-server-5")
    silent.server = Silent()
    _calls(silent, timeout_s=0.7, run=run)


def test_a_crew_without_a_server_says_that_it_waits_for_one():
    async def run(calls, directory):
        task = asyncio.create_task(calls.call(toy_requests(1)))
        await asyncio.sleep(0.05)
        assert calls.waits_for == "a model server for 2 requests"
        await directory.update(Routes((Scripted("model-server-0"),), (0,), version=1))
        assert _names(await task) == toy_tokens(1)
        assert calls.waits_for == ""

    _calls(run=run)


def test_an_exchange_with_a_shard_that_stays_out_of_reach_ends_at_its_deadline():
    async def run():
        directory = Directory()
        shard = MortalEndpoint("store-shard-0", 0, None, lambda method: True)
        await directory.update(Routes(shards=(shard,)))
        async with asyncio.timeout(10):
            with pytest.raises(UnreachableError, match="request lost"):
                await StoreCalls(directory, timeout_s=0.3).exchange([ShareRequest("key", "team")])

    asyncio.run(run())


def test_older_routes_that_come_late_are_ignored():
    old = Scripted("model-server-0", *[GoneError("dead")] * 9)
    new = Scripted("model-server-0", incarnation=1)

    async def run(calls, directory):
        await directory.update(Routes((new,), (0,), version=2))
        await directory.update(Routes((old,), (0,), version=1))
        return _names(await calls.call(toy_requests(1)))

    assert _calls(run=run) == toy_tokens(1)
    assert old.calls == []


def test_forward_passes_of_different_servers_and_incarnations_never_coincide():
    firsts = [
        Endpoint(f"model-server-{i}", k).first_call for i in (*range(120), 1000) for k in range(5)
    ]
    gaps = np.diff(sorted(firsts))
    assert gaps.min() >= 1 << 36 and max(firsts) < 1 << 62


def test_released_problems_are_told_once():
    model = RemoteModel(card_of(Toy(*TOY)))
    model.release(Root((0,), b"a"))
    model.release(Root((0,), b"b"))
    assert model.take_released() == (b"a", b"b")
    assert model.take_released() == ()


def test_repeating_while_unreachable_ends_at_the_deadline_with_the_last_error():
    clock = Clock()
    tries = []

    async def fail():
        tries.append(clock.now)
        clock.now += 1.0
        raise UnreachableError(f"try {len(tries)}")

    with pytest.raises(UnreachableError, match="try 3"):
        asyncio.run(repeat_while_unreachable(fail, deadline=103.0, clock=clock, pause_s=0.0))
    assert tries == [100.0, 101.0, 102.0]


def test_a_cancellation_that_meets_an_answer_is_not_forgotten():
    async def run():
        answer = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(within(answer, 60.0, "an answer"))
        await asyncio.sleep(0)
        answer.set_result(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
