"""Laws of the fleet's parts: health, routes, the model server's queue, the live view (SPEC section 4)."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.health import Health, HealthPolicy
from actors.model_server import BusyError, ModelCall, ModelServer
from actors.routing import RouteTable
from cluster.live import Rates, fleet_line
from sdt_dist.errors import ConfigurationError, ContextError, FleetError
from sdt_dist.models.toy import Toy
from sdt_dist.models.wire import pack_requests, unpack_replies
from sdt_dist.protocols import PriorLaw, RolloutRequest, Root
from tests.fleet_helpers import LAW, TOY, Clock, toy_requests, toy_tokens

POLICY = HealthPolicy(first_pause_s=1.0, longest_pause_s=5.0, steady_s=60.0, misses=3, failed_starts=3)


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
        if any(self.fails.intersection(request.root.prompt) for request in requests):
            raise KeyError("a model's own bug")
        return super().rollout(requests, law)[: None if 4 not in self.fails else 0]


def _call(number: int, rows: int = 2, law: PriorLaw = LAW, timeout_s: float = 60.0) -> ModelCall:
    return ModelCall(f"call {number}", pack_requests(toy_requests(number, rows), law), rows, timeout_s)


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
    assert [_tokens(answer) for answer in answers] == [toy_tokens(1, 2), toy_tokens(2, 3), toy_tokens(3, 1)]
    assert (server.counters.calls, server.counters.batches, server.counters.rows) == (4, 2, 8)
    assert server.counters.largest_batch_rows == 6 and server.counters.waiting_rows == 0
    assert sum(a.seconds for a in answers) <= server.counters.busy_s


def test_different_definitions_of_p_are_not_mixed():
    hot = replace(LAW, sampling_temperature=2.0)
    model, _, answers = _ask_while_busy([_call(1), _call(2, law=hot), _call(3), _call(4, law=hot)])
    assert model.batches == [(2, 1.0), (4, 1.0), (4, 2.0)]
    assert _tokens(answers[1]) == toy_tokens(2, law=hot) and _tokens(answers[2]) == toy_tokens(3)


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
        assert _tokens(await server.answer(_call(2))) == toy_tokens(2)
        assert _tokens(await server.answer(_call(3, 9))) == toy_tokens(3, 9), "larger than the queue, but nothing waits"

    asyncio.run(run())


def test_a_call_whose_time_is_over_is_not_computed():
    calls = [_call(1, timeout_s=5.0), _call(2, timeout_s=60.0)]
    model, _, (late, answer) = _ask_while_busy(calls, clock=Clock(), late_s=10.0)
    assert isinstance(late, FleetError) and "2 rows waited 10 s for its turn" in str(late)
    assert _tokens(answer) == toy_tokens(2) and [size for size, _ in model.batches] == [2, 2]


def test_a_bad_request_fails_only_its_own_call():
    empty = ModelCall("bad", pack_requests([RolloutRequest(Root((), b"empty"), (), 4, key=1)], LAW), 1, 60.0)
    _, server, (good, bad, other) = _ask_while_busy([_call(1), empty, _call(3)])
    assert isinstance(bad, ContextError) and "empty" in str(bad)
    assert _tokens(good) == toy_tokens(1) and _tokens(other) == toy_tokens(3)
    with pytest.raises(ContextError):
        asyncio.run(server.answer(empty))
    malformed = replace(_call(4), packed={"law": _call(4).packed["law"]})
    with pytest.raises(ConfigurationError):
        asyncio.run(server.answer(malformed))


def test_whatever_a_model_raises_fails_only_the_call_to_blame():
    _, _, (good, bad) = _ask_while_busy([_call(1), _call(2)], fails={2})
    assert isinstance(bad, FleetError) and "KeyError" in str(bad) and "model's own bug" in str(bad)
    assert _tokens(good) == toy_tokens(1)


def test_a_model_that_gives_too_few_replies_is_an_error_and_not_a_hang():
    _, _, outcomes = _ask_while_busy([_call(1), _call(2)], fails={4})
    assert all(isinstance(o, FleetError) and "fewer replies" in str(o) for o in outcomes)


def test_a_probe_is_a_real_token():
    model = Toy(*TOY)
    server = ModelServer(model)
    asyncio.run(server.probe())
    assert server.counters.tokens == 1 and model.nfe == 1


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
