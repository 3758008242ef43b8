"""What bounds a search: rollouts, next-token distributions, time, whichever is first."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from sdt_dist.protocols import Cost
from sdt_dist.search.budget import Budget
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.result import SearchCost


class _Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("options", "nfe", "rollouts", "wave"),
    [
        ({}, 0, 0, 8),
        ({}, 970, 97, 3),
        ({}, 1000, 100, 0),
        ({"num_rollouts": 5}, 0, 0, 5),
        ({"num_rollouts": 5}, 60, 6, 0),
        ({"max_nfe": 25}, 0, 0, 2),
        ({"max_nfe": 3}, 0, 0, 1),
        ({"max_nfe": 25}, 10, 2, 3),
        ({"max_nfe": 25}, 25, 2, 0),
        ({"max_nfe": 25, "num_rollouts": 4}, 10, 2, 2),
        ({"max_nfe": 2000}, 0, 500, 8),
    ],
)
def test_a_wave_is_what_is_left_of_every_limit(options, nfe, rollouts, wave):
    """A rollout costs 10 at most; what it costs usually is known from the first on."""
    budget = Budget(10, nfe=nfe, rollouts=rollouts)
    assert budget.next_wave(SearchOptions(**options), 8) == wave


def test_time_ends_a_search_that_has_had_a_rollout():
    clock = _Clock()
    budget = Budget(10, clock)
    options = SearchOptions(time_budget_s=5.0)
    clock.now_s += 6.0
    assert budget.elapsed_s() == 6.0
    assert budget.next_wave(options, 8) == 8
    budget.rollouts = 1
    assert budget.next_wave(options, 8) == 0


def test_a_bill_counts_passes_once_and_goes_on_where_another_ended():
    first = Budget(10)
    first.pay(Cost(3, frozenset({1, 2}), 4))
    first.pay(Cost(2, frozenset({2, 3})))
    first.rollouts = 2
    first.reward_calls = 1
    first.wall_s = 0.5
    assert first.cost() == SearchCost(5, 3, 2, 1, 4, 0.5)
    second = Budget(10)
    second.go_on_from(asdict(first.cost()))
    assert second.cost() == first.cost()
    second.pay(Cost(1, frozenset({1})))
    assert (second.cost().nfe, second.cost().model_calls) == (6, 4)
