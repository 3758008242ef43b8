"""The fleet's logic without Ray: have == want, deaths, lost messages, poison, deadlines.

See docs/architecture/fleet.md.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial

import pytest

from sdt_dist.actors.config import fleet_config
from sdt_dist.models.card import card_of
from sdt_dist.models.loading import load_model
from sdt_dist.models.toy import Toy
from sdt_dist.search.methods import method_names
from tests.fleet_helpers import TOY, PlainBackend, alone, run_controller, same, toy_work
from tests.http_helpers import TOKEN, RunningServer

METHODS = {
    name: {"num_samples": 4} | ({} if name in ("greedy", "sample") else {"num_rollouts": 40})
    for name in method_names()
}


def _load() -> Toy:
    return Toy(*TOY)


def _run(work, backend, config=None, meanwhile=None, timeout_s=60.0):
    config = config or fleet_config({})
    return asyncio.run(run_controller(work, backend, config, 4, meanwhile, timeout_s))


@pytest.mark.parametrize(("searchers", "servers"), [(1, 1), (1, 2), (4, 1), (4, 2)])
def test_a_fleet_gives_the_samples_of_one_process(searchers, servers):
    work = toy_work(_load(), METHODS, 3)
    outcomes = _run(
        work, PlainBackend(_load), fleet_config({"searchers": searchers, "servers": servers})
    )
    assert outcomes.keys() == {w.name for w in work}
    for w in work:
        want = alone(_load(), w)
        assert same(outcomes[w.name], want), w.name
        assert outcomes[w.name].nfe == want.nfe, w.name


def test_a_fleet_reaches_a_model_over_http_and_gives_the_samples_of_one_process(monkeypatch):
    """A Mac outside the cluster: the fleet's model servers pass on what they are asked."""
    monkeypatch.setenv("SDT_HTTP_TOKEN", TOKEN)
    work = toy_work(_load(), METHODS, 3)
    remotes = []

    def reach():
        remotes.append(load_model(server.url))
        return remotes[-1]

    with RunningServer(_load(), card_of(_load(), "toy")) as server:
        outcomes = _run(work, PlainBackend(reach), fleet_config({"searchers": 2, "servers": 2}))
        for remote in remotes:
            remote.model.close()
    assert len(remotes) == 2
    assert [w.name for w in work if not same(outcomes[w.name], alone(_load(), w))] == []
    assert [w.name for w in work if outcomes[w.name].nfe != alone(_load(), w).nfe] == []


class LateBackend(PlainBackend):
    """Its second model server needs a while to start."""

    def _make(self, kind, name):
        target = super()._make(kind, name)
        if name == "model-server-1":
            target.probe = partial(self._probe_late, target.server)
        return target

    async def _probe_late(self, server):
        await asyncio.sleep(0.3)
        await server.probe()


def test_a_server_that_starts_late_changes_neither_a_budget_of_nfe_nor_its_samples():
    budget = {"num_samples": 4, "num_rollouts": 400, "max_nfe": 100}
    work = toy_work(
        _load(), {"best_of_n": budget, "snis": budget, "mcts": budget | {"wave_size": 2}}, 6
    )
    outcomes = _run(work, LateBackend(_load), fleet_config({"servers": 2, "searchers": 2}))
    assert all(same(outcomes[w.name], alone(_load(), w)) for w in work)
    assert all(outcomes[w.name].nfe == alone(_load(), w).nfe for w in work)


@pytest.mark.parametrize("victim", ["model-server-0", "searcher-0"])
def test_deaths_lose_nothing_and_change_no_sample(victim):
    work = toy_work(_load(), {"residual_ts": METHODS["residual_ts"], "dts": METHODS["dts"]}, 12)
    backend = PlainBackend(_load)
    kills = []

    async def kill(controller):
        rng = random.Random(1)
        while len(kills) < 8:
            await asyncio.sleep(rng.uniform(0.01, 0.06))
            if victim in backend.alive and controller.status()["under_way"]:
                backend.alive[victim].die()
                kills.append(controller.status()["done"])

    config = fleet_config({"searchers": 2, "problems_per_searcher": 3, "max_attempts": 50})
    outcomes = _run(work, backend, config, kill)
    assert kills and backend.spawned.count(victim) > 1
    assert outcomes.keys() == {w.name for w in work}
    assert all(same(outcomes[w.name], alone(_load(), w)) for w in work)


@pytest.mark.parametrize("servers", [1, 2])
def test_lost_requests_and_replies_change_nothing(servers):
    work = toy_work(_load(), {"residual_ts": METHODS["residual_ts"], "snis": METHODS["snis"]}, 6)
    outcomes = _run(
        work,
        PlainBackend(_load, loss=0.25, seed=3),
        fleet_config({"searchers": 2, "servers": servers}),
    )
    assert all(same(outcomes[w.name], alone(_load(), w)) for w in work)
    if (
        servers == 1
    ):  # a toy keeps rows: where a second server joins late, searches that it takes over pay for them again
        assert all(outcomes[w.name].nfe == alone(_load(), w).nfe for w in work)
