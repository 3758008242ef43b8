"""Laws of the fleet's parts: health, routes, the live view (docs/architecture/fleet.md)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sdt_dist.actors.controller.health import Health, HealthPolicy
from sdt_dist.actors.controller.routing import RouteTable
from sdt_dist.cluster.live import Rates, fleet_line
from tests.fleet_helpers import Clock

POLICY = HealthPolicy(
    first_pause_s=1.0, longest_pause_s=5.0, steady_s=60.0, misses=3, failed_starts=3
)


def test_health_goes_from_starting_to_ready_suspect_and_dead():
    clock = Clock()
    health = Health(POLICY, clock)
    assert health.state == "starting" and "first probe" in health.reason
    health.answered()
    assert (health.state, health.reason) == ("ready", "")
    assert not health.missed("slow") and not health.missed("slow")
    assert (health.state, health.reason) == ("suspect", "slow")
    health.answered()
    assert health.state == "ready" and not health.missed("slow") and not health.missed("slow")
    clock.now += 14.9
    assert not health.missed("out of reach"), (
        "three probes that fail at once are no 15 s of silence"
    )
    clock.now += 0.1
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


CHANGES = st.lists(
    st.tuples(st.sets(st.integers(0, 9)), st.sets(st.sampled_from("abcd"))), min_size=1, max_size=6
)


@given(CHANGES)
def test_routes_are_balanced_and_move_as_few_crews_as_balance_needs(changes):
    table = RouteTable()
    before = {}
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
    return {
        "under_way": 3,
        "waiting": 4,
        "slots": {"model-server-0": server, "searcher-0": searcher},
    }


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
