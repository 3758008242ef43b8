"""Teams of searchers on a fleet without Ray: shared evidence survives deaths, losses and restarts.

See docs/concepts/exactness.md#shared-evidence.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest

from sdt_dist.actors.config import fleet_config
from sdt_dist.actors.work import Work
from sdt_dist.models.toy import Toy
from sdt_dist.search.result import SearchResult
from sdt_dist.search.sharing_plan import SharingPlan, merge_members
from tests.fleet_helpers import PlainBackend, run_controller, toy_work
from tests.search_helpers import law_of

A = (5, 4, 1.0, "smooth", 5.0, 0)
TEAM = 4
PROBLEMS = 3


def _load() -> Toy:
    return Toy(*A)


def _teams(num_rollouts: int) -> list[Work]:
    """Four searches a problem, with one budget."""
    plan = SharingPlan("run", {i: f"key {i}" for i in range(PROBLEMS)}, TEAM)
    alone = toy_work(
        _load(),
        {"residual_ts": {"num_rollouts": num_rollouts, "wave_size": 4, "num_samples": 6}},
        PROBLEMS,
    )
    return [
        replace(work, name=f"{work.name}/{member.searcher}", membership=member)
        for work in alone
        for member in plan.members(work.problem)
        if member is not None
    ]


def _merged(outcomes) -> list[SearchResult]:
    """One result a problem; every member must have ended well."""
    assert all(isinstance(outcome, SearchResult) for outcome in outcomes.values()), outcomes
    return [
        merge_members([outcomes[f"residual_ts/{problem}/{searcher}"] for searcher in range(TEAM)])
        for problem in range(PROBLEMS)
    ]


def _run(work, backend, config, meanwhile=None) -> list[SearchResult]:
    return _merged(asyncio.run(run_controller(work, backend, config, 4, meanwhile, 90.0)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[SearchResult]:
    backend = PlainBackend(_load, folder=tmp_path_factory.mktemp("shards"))
    return _run(_teams(1000), backend, fleet_config({"searchers": 2, "shards": 2}))


def test_a_team_exhausts_the_toy_exactly(undisturbed):
    model = _load()
    for result in undisturbed:
        assert result.exhausted and result.log_z == pytest.approx(model.log_z, abs=1e-9)
        np.testing.assert_allclose(law_of(result, model), model.target, atol=1e-9)


@pytest.mark.parametrize("victim", ["store-shard", "searcher", "model-server"])
def test_deaths_change_no_sample_of_an_exhausted_team(victim, undisturbed, tmp_path):
    """An exhausted answer is a function of the evidence alone, so it must not depend on who died when."""
    backend = PlainBackend(_load, folder=tmp_path)
    kills = []

    async def kill(controller):
        rng = random.Random(5)
        while len(kills) < 6:
            await asyncio.sleep(rng.uniform(0.02, 0.1))
            name = rng.choice([name for name in backend.alive if name.startswith(victim)] or [""])
            if name and controller.status()["under_way"]:
                backend.alive[name].die()
                kills.append(name)

    config = fleet_config({"searchers": 2, "servers": 2, "shards": 2, "max_attempts": 50})
    results = _run(_teams(1000), backend, config, kill)
    assert kills
    for have, want in zip(results, undisturbed, strict=True):
        assert [s.tokens for s in have.samples] == [s.tokens for s in want.samples]
        assert [s.reward for s in have.samples] == [s.reward for s in want.samples]
        assert have.log_z == want.log_z


def test_lost_exchanges_keep_the_estimate_honest(tmp_path):
    """A quarter of all messages lost, nothing exhausted: every share is whole and log Z is where its error says."""
    model = _load()
    results = _run(
        _teams(120),
        PlainBackend(_load, loss=0.25, seed=2, folder=tmp_path),
        fleet_config({"searchers": 3}),
    )
    for result in results:
        assert result.complete and result.rollouts == 120
        assert abs(np.expm1(result.log_z - model.log_z)) < 5 * result.log_z_error
