"""The exchange between trials and their fleet: nothing is lost, repeated or left waiting.

See docs/guides/sweeps.md.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from sdt_dist.actors.exchange import Exchange
from sdt_dist.errors import FleetError
from sdt_dist.models.toy import Toy
from tests.fleet_helpers import TOY, toy_work

WORK = toy_work(Toy(*TOY), {"snis": {"num_rollouts": 4}}, 4)


def test_every_client_gets_its_own_outcomes_until_it_has_acknowledged_them():
    async def scenario():
        exchange = Exchange()
        await exchange.submit("a", WORK[:2])
        await exchange.submit("b", WORK[2:])
        assert await exchange.take() == WORK and await exchange.take() == []
        for one in WORK:
            await exchange.give(one.name, FleetError(one.name))
        for _ in range(2):  # a lost reply: asked again, answered again
            found = await exchange.collect("a", [], 5)
            assert [name for name, _ in found] == [one.name for one in WORK[:2]]
        assert [name for name, _ in await exchange.collect("a", [WORK[0].name], 5)] == [
            WORK[1].name
        ]
        assert await exchange.collect("a", [WORK[1].name], 0.01) == []
        assert len(await exchange.collect("b", [], 5)) == 2

    asyncio.run(scenario())


def test_work_that_comes_again_is_searched_once_and_a_client_that_came_back_finds_what_was_done():
    async def scenario():
        exchange = Exchange()
        await exchange.submit("a", WORK)
        assert len(await exchange.take()) == 4
        await exchange.give(WORK[0].name, FleetError("done"))
        await exchange.submit("a", WORK)  # the trial died and was started again
        assert await exchange.take() == []
        assert [name for name, _ in await exchange.collect("a", [], 5)] == [WORK[0].name]

    asyncio.run(scenario())


def test_a_client_that_left_is_searched_for_and_kept_for_no_more():
    async def scenario():
        exchange = Exchange()
        await exchange.submit("a", WORK[:2])
        await exchange.submit("b", WORK[2:])
        await exchange.leave("a")
        assert await exchange.take() == WORK[2:]
        await exchange.give(WORK[0].name, FleetError("late"))
        assert await exchange.collect("a", [], 0.01) == []
        await exchange.submit("a", WORK[:1])  # and may come back
        assert await exchange.take() == WORK[:1]

    asyncio.run(scenario())


def test_who_waits_is_woken_by_its_outcome_and_nobody_waits_for_a_fleet_that_has_died():
    async def scenario():
        exchange = Exchange()
        await exchange.submit("a", WORK[:2])
        begin = time.monotonic()
        waiting = [asyncio.create_task(exchange.collect(name, [], 30)) for name in ("a", "b")]
        await asyncio.sleep(0)
        await exchange.give(WORK[0].name, FleetError("one"))
        assert len(await waiting[0]) == 1 and not waiting[1].done()
        await exchange.fail(FleetError("no model-server can be started"))
        with pytest.raises(FleetError, match="no model-server"):
            await waiting[1]
        assert len(await exchange.collect("a", [], 30)) == 1, "what was finished before is not lost"
        with pytest.raises(FleetError, match="no model-server"):
            await exchange.collect("a", [WORK[0].name], 30)
        with pytest.raises(FleetError, match="no model-server"):
            await exchange.submit("b", WORK[2:])
        assert time.monotonic() - begin < 10

    asyncio.run(scenario())
