"""Laws of the model server's queue, which the fleet's actors and `sdt serve` share.

See docs/architecture/fleet.md.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from sdt_dist.errors import ConfigurationError, ContextError, FleetError
from sdt_dist.models.remote.calls import BusyError, LateError, ModelCall, NameTakenError
from sdt_dist.models.remote.wire import pack_requests, unpack_replies
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest, Root
from sdt_dist.serving.server import ModelServer
from tests.fleet_helpers import LAW, TOY, Clock, toy_requests, toy_tokens


class Gated(Toy):
    """A model whose thread waits for `gate`, and that says what it was asked in each call."""

    def __init__(self) -> None:
        super().__init__(*TOY)
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.batches = []
        self.fails: set[int] = set()

    def rollout(self, requests, law):
        self.batches.append((len(requests), law.sampling_temperature))
        self.begun.release()
        assert self.gate.wait(20), "nobody opened the gate"
        if any(self.fails.intersection(request.root.prompt) for request in requests):
            raise KeyError("a model's own bug")
        return super().rollout(requests, law)[: None if 4 not in self.fails else 0]


def _call(number: int, rows: int = 2, law: PriorLaw = LAW, timeout_s: float = 60.0) -> ModelCall:
    return ModelCall(f"call {number}", pack_requests(toy_requests(number, rows), law), timeout_s)


async def _begun(model: Gated) -> None:
    """Until the model's thread is in a call."""
    assert await asyncio.get_running_loop().run_in_executor(None, model.begun.acquire, True, 20)


async def _waiting(server: ModelServer, calls: int) -> None:
    while server.counters.waiting_calls != calls:
        await asyncio.sleep(0)


def _ask_while_busy(
    calls: list[ModelCall],
    fails: set[int] = frozenset(),
    clock=None,
    late_s: float = 0.0,
    **options,
):
    """(model, server, outcomes) of calls that all arrive while the model works on an earlier one."""

    async def run():
        model = Gated()
        server = ModelServer(model, **options | ({"clock": clock} if clock else {}))
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


def test_what_waits_is_merged_into_one_batch_and_answered_as_if_alone():
    model, server, answers = _ask_while_busy([_call(1, 2), _call(2, 3), _call(3, 1)])
    assert [size for size, _ in model.batches] == [2, 6]
    assert [_tokens(answer) for answer in answers] == [
        toy_tokens(1, 2),
        toy_tokens(2, 3),
        toy_tokens(3, 1),
    ]
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
        assert _tokens(await server.answer(_call(3, 9))) == toy_tokens(3, 9), (
            "larger than the queue, but nothing waits"
        )

    asyncio.run(run())


def test_a_call_whose_time_is_over_is_not_computed():
    calls = [_call(1, timeout_s=5.0), _call(2, timeout_s=60.0)]
    model, _, (late, answer) = _ask_while_busy(calls, clock=Clock(), late_s=10.0)
    assert isinstance(late, LateError) and "2 rows waited 10 s for its turn" in str(late)
    assert _tokens(answer) == toy_tokens(2) and [size for size, _ in model.batches] == [2, 2]


def test_a_bad_request_fails_only_its_own_call():
    empty = ModelCall(
        "bad", pack_requests([RolloutRequest(Root((), b"empty"), (), 4, key=1)], LAW), 60.0
    )
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


def test_a_name_is_refused_for_other_requests_and_free_again_after_a_failure():
    async def run():
        server = ModelServer(Toy(*TOY))
        good = _call(1)
        first = await server.answer(good)
        with pytest.raises(NameTakenError, match="call 1 was used for other requests"):
            await server.answer(replace(_call(2), name=good.name))
        assert await server.answer(good) is first
        empty = pack_requests([RolloutRequest(Root((), b"empty"), (), 4, key=1)], LAW)
        with pytest.raises(ContextError):
            await server.answer(ModelCall("again", empty, 60.0))
        assert _tokens(await server.answer(replace(_call(2), name="again"))) == toy_tokens(2)

    asyncio.run(run())


def test_a_model_call_has_no_more_rows_than_allowed_unless_one_caller_asks_for_them():
    model, _, answers = _ask_while_busy(
        [_call(1, 3), _call(2, 4), _call(3, 1), _call(4, 9)], max_rows=5
    )
    assert [size for size, _ in model.batches] == [2, 4, 4, 9]
    assert [_tokens(a) for a in answers] == [
        toy_tokens(1, 3),
        toy_tokens(2, 4),
        toy_tokens(3, 1),
        toy_tokens(4, 9),
    ]


def test_a_late_call_is_told_so_whatever_waits_before_it():
    hot = replace(LAW, sampling_temperature=2.0)
    calls = [_call(1), _call(2, law=hot, timeout_s=5.0)]
    model, server, (answer, late) = _ask_while_busy(calls, clock=Clock(), late_s=10.0)
    assert isinstance(late, LateError) and _tokens(answer) == toy_tokens(1)
    assert [size for size, _ in model.batches] == [2, 2] and server.counters.waiting_calls == 0


def test_problems_go_when_released_and_the_least_recently_used_ones_by_themselves():
    async def run():
        model = Toy(*TOY)
        server = ModelServer(model, max_problems=2)

        async def use(*numbers: int, released: tuple[bytes, ...] = ()) -> set[int]:
            asked = [ExpandRequest(Root((1,), bytes([number])), (), 2) for number in numbers]
            await server.answer(
                ModelCall(f"{model.nfe} {numbers}", pack_requests(asked, LAW), 60.0, released)
            )
            return {digest[0] for digest in model._prefixes}

        assert [await use(1), await use(2), await use(1), await use(3)] == [
            {1},
            {1, 2},
            {1, 2},
            {1, 3},
        ]
        assert await use(4, 5, 6) == {4, 5, 6}, "a batch keeps its own problems"
        assert await use(7, released=(bytes([4]), bytes([6]))) == {5, 7}
        await server.release([bytes([5])])
        assert {digest[0] for digest in model._prefixes} == {7}

    asyncio.run(run())


def test_a_closed_server_turns_everybody_away_and_ends_what_the_model_works_on():
    async def run():
        model = Gated()
        server = ModelServer(model, name="it")
        running = asyncio.create_task(server.answer(_call(0)))
        await _begun(model)
        waiting = asyncio.create_task(server.answer(_call(1)))
        await _waiting(server, 1)
        server.close()
        for refused in (waiting, server.answer(_call(2))):
            with pytest.raises(BusyError, match="it: it is being stopped"):
                await refused
        await server.release([b"x"])
        model.gate.set()
        assert _tokens(await running) == toy_tokens(0) and [size for size, _ in model.batches] == [
            2
        ]

    asyncio.run(run())


def test_a_model_that_batches_by_itself_gets_as_many_calls_at_once_as_it_takes():
    async def run():
        clock = Clock()
        model = Gated()
        model.concurrent_calls = 2
        server = ModelServer(model, clock=clock)
        tasks = []
        for number in range(2):
            tasks.append(asyncio.create_task(server.answer(_call(number))))
            await _begun(model)
        tasks += [asyncio.create_task(server.answer(_call(number))) for number in (2, 3)]
        await _waiting(server, 2)
        clock.now += 3.0
        model.gate.set()
        return model, server, await asyncio.gather(*tasks)

    model, server, answers = asyncio.run(run())
    assert [size for size, _ in model.batches][:2] == [2, 2] and sum(
        size for size, _ in model.batches
    ) == 8
    assert [_tokens(answer) for answer in answers] == [toy_tokens(number, 2) for number in range(4)]
    assert server.counters.busy_s == 3.0, (
        "two calls at once keep the model busy for the time of one"
    )


def test_a_call_that_comes_right_after_the_last_one_was_answered_is_served():
    """The second caller asks as soon as the server's worker has ended, before its callbacks have run."""

    async def run():
        server = ModelServer(Toy(*TOY))
        found = []
        for number in range(30):
            first = asyncio.create_task(server.answer(_call(2 * number)))
            await asyncio.sleep(0)
            while server._workers and not server._workers[-1].done():
                await asyncio.sleep(0)
            async with asyncio.timeout(20):
                found += [await server.answer(_call(2 * number + 1)), await first]
        return found

    answers = asyncio.run(run())
    expected = [toy_tokens(2 * number + place, 2) for number in range(30) for place in (1, 0)]
    assert [_tokens(answer) for answer in answers] == expected
