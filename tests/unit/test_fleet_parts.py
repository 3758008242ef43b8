"""Laws of the fleet's parts: health, routes, the model server's queue, a searcher's calls, the live view (SPEC section 4)."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.calls import Directory, RemoteModel, Routes, ServerCalls, ServersDiedError
from actors.endpoint import Endpoint, GoneError, PlainEndpoint, UnreachableError, repeat_while_unreachable, within
from actors.health import Health, HealthPolicy
from actors.model_server import BusyError, ModelCall, ModelServer
from actors.routing import RouteTable
from cluster.live import Rates, fleet_line
from sdt_dist.errors import ContextError, FleetError
from sdt_dist.models.card import card_of
from sdt_dist.models.toy import Toy
from sdt_dist.models.wire import pack_requests, unpack_replies
from sdt_dist.protocols import PriorLaw, RolloutRequest, Root

TOY = (5, 4, 1.0, "smooth", 5.0, 0)
LAW = PriorLaw((0, 5))
POLICY = HealthPolicy(first_pause_s=1.0, longest_pause_s=5.0, steady_s=60.0, misses=3, failed_starts=3)


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Gated(Toy):
    """A model whose thread waits for `gate`, and that says what it was asked in each call."""

    def __init__(self) -> None:
        super().__init__(*TOY)
        self.gate, self.begun, self.batches = threading.Event(), threading.Semaphore(0), []
        self.fails: set[int] = set()

    def rollout(self, requests, law):
        self.batches.append((len(requests), law.sampling_temperature))
        self.begun.release()
        assert self.gate.wait(20), "nobody opened the gate"
        if any(request.root.prompt[0] in self.fails for request in requests):
            raise KeyError("a model's own bug")
        return super().rollout(requests, law)[: None if 4 not in self.fails else 0]


def _requests(number: int, rows: int = 2, tokens: int = 4) -> list[RolloutRequest]:
    root = Root((number % 5,), bytes([number]))
    return [RolloutRequest(root, (), tokens, key=1000 * number + row) for row in range(rows)]


def _call(number: int, rows: int = 2, law: PriorLaw = LAW, timeout_s: float = 60.0, **options) -> ModelCall:
    return ModelCall(f"call {number}", pack_requests(_requests(number, rows, **options), law), rows, timeout_s)


async def _begun(model: Gated) -> None:
    """Until the model's thread is in a call."""
    assert await asyncio.get_running_loop().run_in_executor(None, model.begun.acquire, True, 20)


async def _waiting(server: ModelServer, calls: int) -> None:
    while server.counters.waiting_calls != calls:
        await asyncio.sleep(0)


def _ask_while_busy(calls: list[ModelCall], fails: set[int] = frozenset(), clock=None, late_s: float = 0.0):
    """(model, server, outcomes) of calls that all arrive while the model works on an earlier one."""

    async def run():
        model = Gated()
        server = ModelServer(model, **({"clock": clock} if clock else {}))
        first = asyncio.create_task(server.answer(_call(0)))
        await _begun(model)
        tasks = [asyncio.create_task(server.answer(call)) for call in calls]
        await _waiting(server, len({call.name for call in calls}))
        if clock:
            clock.now += late_s
        model.fails = set(fails)
        model.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(first, return_exceptions=True)
        return model, server, outcomes

    return asyncio.run(run())


def _tokens(answer) -> list[list[int]]:
    return [reply.tokens.tolist() for reply in unpack_replies(answer.packed)]


def _wanted(number: int, rows: int = 2, law: PriorLaw = LAW) -> list[list[int]]:
    return [reply.tokens.tolist() for reply in Toy(*TOY).rollout(_requests(number, rows), law)]


def test_health_goes_from_starting_to_ready_suspect_and_dead():
    health = Health(POLICY, Clock())
    assert health.state == "starting" and "first probe" in health.reason
    health.answered()
    assert (health.state, health.reason) == ("ready", "")
    assert not health.missed("slow") and not health.missed("slow")
    assert (health.state, health.reason) == ("suspect", "slow")
    health.answered()
    assert health.state == "ready" and not health.missed("slow") and not health.missed("slow")
    assert health.missed("slow")
    health.died("slow")
    assert (health.state, health.reason, health.deaths) == ("dead", "slow", 1)


def test_the_pause_doubles_up_to_its_limit_and_starts_over_after_a_steady_time():
    clock = Clock()
    health = Health(POLICY, clock)
    pauses = []
    for lived_s in (1, 1, 1, 1, 1, 59, 60, 1):
        health.restarting()
        health.answered()
        clock.now += lived_s
        pauses.append(health.died("killed"))
    assert pauses == [1, 2, 4, 5, 5, 5, 1, 2]
    assert health.state == "dead"


def test_only_starts_that_fail_in_a_row_are_given_up():
    health = Health(POLICY, Clock())
    for _ in range(2):
        health.died("no memory")
        health.restarting()
    health.answered()
    health.died("killed")
    assert health.state == "dead"
    for _ in range(3):
        assert health.state == "dead"
        health.restarting()
        health.died("no memory")
    assert (health.state, health.reason) == ("given up", "no memory")


CHANGES = st.lists(st.tuples(st.sets(st.integers(0, 9)), st.sets(st.sampled_from("abcd"))), min_size=1, max_size=6)


@given(CHANGES)
def test_routes_are_balanced_and_move_as_few_crews_as_balance_needs(changes):
    table, before = RouteTable(), {}
    for crews, servers in ((sorted(c), sorted(s)) for c, s in changes):
        now = table.assign(crews, servers)
        if not servers:
            assert now == {}
            before = {}
            continue
        loads = {server: list(now.values()).count(server) for server in servers}
        assert sorted(now) == crews and set(now.values()) <= set(servers)
        assert max(loads.values()) - min(loads.values()) <= 1
        kept = {crew: server for crew, server in before.items() if crew in now and server in loads}
        have = sorted((list(kept.values()).count(server) for server in servers), reverse=True)
        small, larger = divmod(len(crews), len(servers))
        fewest = sum(max(0, load - small - (place < larger)) for place, load in enumerate(have))
        assert sum(now[crew] != server for crew, server in kept.items()) == fewest
        assert table.assign(crews, servers) == now
        before = now


def test_what_waits_is_merged_into_one_batch_and_answered_as_if_alone():
    model, server, answers = _ask_while_busy([_call(1, 2), _call(2, 3), _call(3, 1)])
    assert [size for size, _ in model.batches] == [2, 6]
    assert [_tokens(answer) for answer in answers] == [_wanted(1, 2), _wanted(2, 3), _wanted(3, 1)]
    assert (server.counters.calls, server.counters.batches, server.counters.rows) == (4, 2, 8)
    assert server.counters.largest_batch_rows == 6 and server.counters.waiting_rows == 0
    assert sum(a.seconds for a in answers) <= server.counters.busy_s


def test_different_definitions_of_p_are_not_mixed():
    hot = replace(LAW, sampling_temperature=2.0)
    model, _, answers = _ask_while_busy([_call(1), _call(2, law=hot), _call(3), _call(4, law=hot)])
    assert model.batches == [(2, 1.0), (4, 1.0), (4, 2.0)]
    assert _tokens(answers[1]) == _wanted(2, law=hot) and _tokens(answers[2]) == _wanted(3)


def test_a_repeated_name_is_computed_once():
    model, server, answers = _ask_while_busy([_call(1), _call(1)])
    assert [size for size, _ in model.batches] == [2, 2] and answers[0] is answers[1]
    assert asyncio.run(server.answer(_call(1))) is answers[0]
    assert len(model.batches) == 2 and server.counters.rows == 4


def test_a_full_queue_refuses_and_takes_the_same_call_later():
    async def run():
        model = Gated()
        server = ModelServer(model, name="model-server-7", queue_rows=4)
        tasks = [asyncio.create_task(server.answer(_call(0)))]
        await _begun(model)
        tasks.append(asyncio.create_task(server.answer(_call(1, 4))))
        await _waiting(server, 1)
        with pytest.raises(BusyError, match="model-server-7: 4 rows wait, allowed 4"):
            await server.answer(_call(2))
        model.gate.set()
        await asyncio.gather(*tasks)
        assert _tokens(await server.answer(_call(2))) == _wanted(2)
        assert _tokens(await server.answer(_call(3, 9))) == _wanted(3, 9), "larger than the queue, but nothing waits"

    asyncio.run(run())


def test_a_call_whose_time_is_over_is_not_computed():
    calls = [_call(1, timeout_s=5.0), _call(2, timeout_s=60.0)]
    model, _, (late, answer) = _ask_while_busy(calls, clock=Clock(), late_s=10.0)
    assert isinstance(late, FleetError) and "2 rows waited 10 s for its turn" in str(late)
    assert _tokens(answer) == _wanted(2) and [size for size, _ in model.batches] == [2, 2]


def test_a_bad_request_fails_only_its_own_call():
    _, server, (good, bad, other) = _ask_while_busy([_call(1), _call(2, tokens=99), _call(3)])
    assert isinstance(bad, ContextError)
    assert _tokens(good) == _wanted(1) and _tokens(other) == _wanted(3)
    with pytest.raises(ContextError):
        asyncio.run(server.answer(_call(2, tokens=99)))


def test_whatever_a_model_raises_fails_only_the_call_to_blame():
    _, _, (good, bad) = _ask_while_busy([_call(1), _call(2)], fails={2})
    assert isinstance(bad, FleetError) and "KeyError" in str(bad) and "model's own bug" in str(bad)
    assert _tokens(good) == _wanted(1)


def test_a_model_that_gives_too_few_replies_is_an_error_and_not_a_hang():
    _, _, outcomes = _ask_while_busy([_call(1), _call(2)], fails={4})
    assert all(isinstance(o, FleetError) and "fewer replies" in str(o) for o in outcomes)


def test_a_probe_is_a_real_token():
    model = Toy(*TOY)
    server = ModelServer(model)
    asyncio.run(server.probe())
    assert server.counters.tokens == 1 and model.nfe == 1


class Scripted(Endpoint):
    """A model server that fails as its script says and answers when that is over."""

    def __init__(self, name: str, *script: Exception, incarnation: int = 0) -> None:
        super().__init__(name, incarnation)
        self.script, self.calls, self.server = list(script), [], ModelServer(Toy(*TOY), name=name)

    async def call(self, method, *arguments, timeout_s):
        self.calls.append(arguments[0].name)
        if self.script:
            raise self.script.pop(0)
        return await within(getattr(self.server, method)(*arguments), timeout_s, f"{method} of {self.name}")


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
    dead, other = Scripted("model-server-0", GoneError("killed")), Scripted("model-server-1")
    again = Scripted("model-server-0", incarnation=1)

    async def run(calls, directory):
        first = [_names(await calls.call(_requests(n))) for n in (1, 2)]
        await directory.update(Routes((again, other), (0,), version=1))
        return [*first, _names(await calls.call(_requests(3)))]

    assert _calls(dead, other, run=run) == [_wanted(1), _wanted(2), _wanted(3)]
    assert (len(dead.calls), len(other.calls), len(again.calls)) == (1, 2, 1)


def test_servers_that_keep_dying_on_a_call_end_it():
    servers = [Scripted(f"model-server-{i}", GoneError(f"death {i}")) for i in range(4)]

    async def run(calls, directory):
        with pytest.raises(ServersDiedError, match=r"3 model servers died on 2 requests \(death 2\)"):
            await calls.call(_requests(1))

    _calls(*servers, run=run)
    assert [len(server.calls) for server in servers] == [1, 1, 1, 0]


def test_a_busy_or_unreachable_server_is_asked_again_under_the_same_name():
    server = Scripted("model-server-0", BusyError("full"), UnreachableError("lost"), BusyError("full"))

    async def run(calls, directory):
        begin = asyncio.get_running_loop().time()
        found = _names(await calls.call(_requests(1)))
        return found, asyncio.get_running_loop().time() - begin

    found, waited_s = _calls(server, run=run)
    assert found == _wanted(1)
    assert len(server.calls) == 4 and len(set(server.calls)) == 1
    assert waited_s >= 0.05 + 0.1 + 0.2, "the pauses double"


@pytest.mark.parametrize(
    ("servers", "error", "words"),
    [
        ((), FleetError, "a model server that can be called"),
        ([Scripted("model-server-0", *[BusyError("model-server-0: full")] * 9)], BusyError, "model-server-0: full"),
    ],
)
def test_a_call_ends_at_its_deadline_and_says_what_it_waited_for(servers, error, words):
    async def run(calls, directory):
        with pytest.raises(error, match=words):
            await calls.call(_requests(1))

    _calls(*servers, timeout_s=0.3, run=run)


def test_a_server_that_never_answers_is_named_while_it_is_waited_for_and_at_the_deadline():
    class Silent:
        async def answer(self, call):
            await asyncio.Event().wait()

    async def run(calls, directory):
        task = asyncio.create_task(calls.call(_requests(1)))
        while not calls.waits_for:
            await asyncio.sleep(0)
        assert calls.waits_for == "2 requests at model-server-5"
        with pytest.raises(FleetError, match="waited 1 s for answer of model-server-5"):
            await task

    _calls(PlainEndpoint("model-server-5", Silent()), timeout_s=0.7, run=run)


def test_older_routes_that_come_late_are_ignored():
    old, new = Scripted("model-server-0", *[GoneError("dead")] * 9), Scripted("model-server-0", incarnation=1)

    async def run(calls, directory):
        await directory.update(Routes((new,), (0,), version=2))
        await directory.update(Routes((old,), (0,), version=1))
        return _names(await calls.call(_requests(1)))

    assert _calls(run=run) == _wanted(1)
    assert old.calls == []


def test_forward_passes_of_different_servers_and_incarnations_never_coincide():
    firsts = [Endpoint(f"model-server-{i}", k).first_call for i in (*range(120), 1000) for k in range(5)]
    gaps = np.diff(sorted(firsts))
    assert gaps.min() >= 1 << 36 and max(firsts) < 1 << 62


def test_released_problems_are_told_once():
    model = RemoteModel(card_of(Toy(*TOY)))
    model.release(Root((0,), b"a"))
    model.release(Root((0,), b"b"))
    assert model.take_released() == (b"a", b"b")
    assert model.take_released() == ()


def test_repeating_while_unreachable_ends_at_the_deadline_with_the_last_error():
    clock, tries = Clock(), []

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


def _status(rows: int, state: str = "ready", deaths: int = 0) -> dict:
    server = {
        "state": state,
        "reason": "it was killed",
        "deaths": deaths,
        "rows": rows,
        "tokens": 10 * rows,
        "nfe": rows,
    }
    searcher = {"state": "ready", "reason": "", "deaths": 0, "rows": 5}
    return {"under_way": 3, "waiting": 4, "slots": {"model-server-0": server, "searcher-0": searcher}}


def test_rates_are_growth_per_second_and_none_after_a_server_was_replaced():
    rates = Rates()
    assert rates.of(_status(100), now=10.0) == {}
    assert rates.of(_status(150), now=12.0) == {"rows": 25.0, "tokens": 250.0, "nfe": 25.0}
    assert rates.of(_status(7), now=13.0) == {}
    assert rates.of(_status(9), now=14.0)["rows"] == 2.0


def test_the_fleet_line_says_who_is_ready_and_who_is_not_well():
    line = fleet_line(_status(1), {"rows": 1234.5})
    assert "model-server 1/1 ready" in line and "searcher 1/1 ready" in line
    assert "3 under way, 4 waiting" in line and "1,234 rows/s" in line and "killed" not in line
    ill = fleet_line(_status(1, "dead", 2), {})
    assert "model-server 0/1 ready" in ill and "model-server-0 dead: it was killed" in ill
