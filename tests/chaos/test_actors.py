"""Twenty kills of each kind of actor, through the real controller: nothing lost, nothing twice, no sample changed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from sdt_dist.actors.work import Work
from sdt_dist.models.toy import Toy
from sdt_dist.search.result import SearchResult
from sdt_dist.values.records import Membership
from tests.chaos.killing import Killer
from tests.chaos.slow import Slow
from tests.fleet_helpers import TOY, alone, same, toy_work
from tests.ray_helpers import run_all

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(500),
]

KILLS = 20
PROBLEMS = 200
METHODS = {
    "residual_ts": {"num_samples": 4, "num_rollouts": 40},
    "dts": {"num_samples": 4, "num_rollouts": 40},
}
FLEET = {"searchers": 2, "servers": 2, "shards": 2, "problems_per_searcher": 2}
ATTEMPTS = 40  # the same few actors die twenty times in two minutes, so a search may well be caught in five deaths


def _alone(work: list[Work]) -> dict[str, SearchResult]:
    return {w.name: alone(Toy(*TOY), w) for w in work}


def _shared(work: list[Work]) -> list[Work]:
    """Each search a team of one, so that its evidence goes through the store and its samples do not depend on timing."""
    return [
        replace(w, membership=Membership(w.name, f"chaos/{w.name}", 0, 1))
        for w in work
        if w.method == "residual_ts"
    ]


def _undisturbed(work: list[Work]) -> dict[str, SearchResult]:
    return run_all(work, partial(Toy, *TOY), **FLEET)


@pytest.mark.parametrize(
    ("kind", "fleet", "prepare", "want"),
    [
        ("searcher", FLEET | {"searchers": 4}, list, _alone),
        ("model-server", FLEET | {"servers": 4}, list, _alone),
        ("store-shard", FLEET | {"shards": 4}, _shared, _undisturbed),
    ],
    ids=["searcher", "model-server", "store-shard"],
)
def test_twenty_kills_lose_nothing_and_change_no_sample(
    kind, fleet, prepare, want, tmp_path, table
):
    work = prepare(toy_work(Toy(*TOY), METHODS, PROBLEMS))
    wanted = want(work)
    slow = tmp_path / "slow"
    slow.touch()
    killer = Killer(
        kind, KILLS, seed=sum(kind.encode()), finished=partial(slow.unlink, missing_ok=True)
    )
    statuses = []
    killer.start()
    try:
        outcomes = run_all(
            work,
            partial(Slow, 0.25, str(slow)),
            watch=statuses.append,
            **fleet,
            max_attempts=ATTEMPTS,
        )
    finally:
        killer.stop()
    table.append(killer.recovery)
    assert not killer.error, killer.error
    assert len(killer.recovery.replaced_s) == KILLS and statuses[-1]["deaths"] >= KILLS
    assert outcomes.keys() == {w.name for w in work}
    assert [name for name, outcome in outcomes.items() if not same(outcome, wanted[name])] == []
    killer.recovery.notes = (
        f"{statuses[-1]['restarted_searches']} searches started again, {len(work)} in all"
    )
