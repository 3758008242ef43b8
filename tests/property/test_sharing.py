"""Several searches of one problem, and searches from earlier evidence, stay exact.

See docs/concepts/exactness.md, docs/concepts/exactness.md#shared-evidence.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from sdt_dist.errors import ConfigurationError, FleetError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from sdt_dist.search.sharing_plan import MissingWalksError, SharingPlan, merge_members
from sdt_dist.values.catalogue import Catalogue
from sdt_dist.values.estimate import places, shared_estimate
from sdt_dist.values.extract import walks_of
from sdt_dist.values.records import Shared
from sdt_dist.values.reweigh import reweigh
from sdt_dist.values.store import EvidenceStore
from tests.search_helpers import (
    PARAMETERS,
    law_of,
    mean_total_variation,
    run_toy,
    total_variation,
    toy,
)
from tests.sharing_helpers import KEY, Team, UnreliableStore, run_teams


def ratios(results: list[SearchResult]) -> np.ndarray:
    """Z-hat / Z of searches of toy U at its own lambda."""
    return np.exp([result.log_z - toy("U").log_z for result in results])


def forgetful_ratio(result: SearchResult) -> float:
    """Z-hat / Z of the same walks when every S_i is taken to be what was known in the end."""
    model = toy("U")
    walks = walks_of(result.snapshot, "run")
    known = {walk.stream: walk.number + 1 for walk in walks}
    wrong = [replace(walk, known=known) for walk in walks]
    catalogue = Catalogue.of(wrong, model.multipliers)
    return float(
        np.exp(
            shared_estimate(wrong, places(wrong), catalogue, model.inverse_temperature).log_z
            - model.log_z
        )
    )


@pytest.mark.slow
def test_a_team_is_unbiased_over_ten_thousand_runs_and_forgetting_what_walks_knew_is_not():
    runs = run_teams("U", 8, 4, runs=10_000)
    assert all(run.complete and run.log_z_unbiased and run.rollouts == 8 for run in runs)
    found = ratios(runs)
    assert abs(found.mean() - 1) < min(4 * found.std() / np.sqrt(len(found)), 0.02)
    assert np.mean([forgetful_ratio(run) for run in runs[:2000]]) > 1.05


def test_a_team_of_four_is_as_good_as_one_searcher():
    alone = mean_total_variation("A", "residual_ts", 300, range(100, 108), wave_size=1)
    found = [
        total_variation(law_of(run_teams("A", 360, 4, seed=s)[0], toy("A")), toy("A"))
        for s in range(100, 108)
    ]
    assert np.mean(found) <= alone


@pytest.mark.slow
def test_a_team_of_four_is_as_good_as_one_searcher_on_toy_c():
    alone = mean_total_variation("C", "residual_ts", 3000, range(100, 104), wave_size=1)
    found = [
        total_variation(law_of(run_teams("C", 3600, 4, seed=s)[0], toy("C")), toy("C"))
        for s in range(100, 104)
    ]
    assert np.mean(found) <= alone


def test_an_exhausted_team_gives_the_exact_answer_whatever_the_interleaving():
    model = toy("A")
    results = [run_teams("A", 1000, 4, in_flight=4, wave_size=8)[0]]
    for order in range(3):
        team = Team("A", EvidenceStore(), seed=1, num_rollouts=1000, wave_size=8)
        for searcher in range(4):
            team.start(searcher, 4)
        members = team.finish(np.random.default_rng(order))
        results += [member for member in members if member.complete]
    for result in results:
        assert result.exhausted and result.log_z_unbiased
        assert result.samples == results[0].samples
        assert result.finished == results[0].finished
        assert result.distribution() == results[0].distribution()
        np.testing.assert_allclose(law_of(result, model), model.target, atol=1e-9)
        assert result.log_z == pytest.approx(model.log_z, abs=1e-9)
    assert len(results) >= 4


def test_members_that_see_everything_return_the_same_samples():
    team = Team("C", EvidenceStore(), num_rollouts=40, wave_size=3)
    for searcher in range(3):
        team.start(searcher, 3)
    first = merge_members(team.finish(np.random.default_rng(0)))
    team.results.clear()
    for searcher in range(3):  # nothing is left to do: each only reads
        team.start(searcher, 3, incarnation=1)
    for result in team.finish(np.random.default_rng(1)):
        assert (result.samples, result.finished, result.log_z) == (
            first.samples,
            first.finished,
            first.log_z,
        )
        assert result.rollouts == result.nfe == 0


def test_teams_repeat_exactly_and_pay_what_the_model_computed():
    model = Toy(*PARAMETERS["C"])
    process = TokenProcess(model, model.law, model.length)
    problem = SearchProblem(0, process.root([0]), model)
    plan = SharingPlan("r", {0: "k"}, 3)
    options = {"num_rollouts": 50, "wave_size": 4}
    ((_, result),) = run_searches(
        process, [problem], method="residual_ts", options=options, seed=1, sharing=plan
    )
    assert isinstance(result, SearchResult)
    assert (result.nfe, result.model_calls, result.rollouts) == (model.nfe, model.model_calls, 50)
    assert result.tree_stats["rollouts"] == 50
    (again,) = run_teams("C", 50, 3, wave_size=4, inverse_temperature=1.0)
    assert (again.samples, again.log_z, again.nfe) == (result.samples, result.log_z, result.nfe)


def test_shares_of_the_budget_are_tickets_fixed_in_advance():
    (result,) = run_teams("C", 10, 4)
    walks = walks_of(result.snapshot, "run")
    place = places(walks, "r/0")
    assert sorted(place) == list(range(10))
    assert all(p == walk.ticket * 4 + walk.searcher for p, walk in zip(place, walks, strict=True))
    with pytest.raises(
        ConfigurationError, match="searchers_per_problem: 4, allowed at most num_rollouts = 3"
    ):
        run_teams("C", 3, 4)


def test_an_unreliable_store_loses_nothing_and_keeps_the_estimate_unbiased():
    found = []
    restarted = 0
    rng = np.random.default_rng(5)
    for index in range(400):
        team = Team("U", UnreliableStore(rng), seed=3, index=index, num_rollouts=8)
        for searcher in range(4):
            team.start(searcher, 4)
        results = team.finish(rng)
        try:
            found.append(merge_members(results))
        except MissingWalksError:  # the store restarted after some had ended: start all again
            team.store = EvidenceStore()
            for searcher in range(4):
                team.start(searcher, 4, incarnation=1)
            found.append(merge_members(team.finish(rng)))
            restarted += 1
    values = ratios(found)
    assert 0 < restarted < 400
    assert all(result.complete for result in found)
    assert abs(values.mean() - 1) < 4 * values.std() / np.sqrt(len(values)) < 0.12


def test_a_store_that_restarts_empty_is_filled_again_by_those_who_know():
    team = Team("C", EvidenceStore(), num_rollouts=12)
    for searcher in range(2):
        team.start(searcher, 2)
    for _ in range(4):
        team.step((0, 0))
        team.step((1, 0))
    before = team.store.held(KEY)
    assert min(before.values()) >= 1
    team.store = EvidenceStore()
    results = team.finish(np.random.default_rng(0))
    assert team.store.held(KEY) == {"r/0/0/0": 6, "r/0/1/0": 6}
    assert merge_members(results).rollouts == 12


class _DeadStore:
    """Answers, and keeps nothing."""

    def exchange(self, requests):
        return [Shared((), {}, {}) for _ in requests]


def test_a_store_that_keeps_nothing_is_given_up():
    team = Team("C", _DeadStore(), num_rollouts=4)
    team.start(0, 1)
    with pytest.raises(FleetError, match="r/0/0/0"):
        team.finish(np.random.default_rng(0))


def crashed(index: int, rng: np.random.Generator) -> tuple[SearchResult, EvidenceStore]:
    """A team of two on toy U; searcher 0 dies, and what it had just sent arrives when its successor is under way."""
    store = EvidenceStore()
    team = Team("U", store, seed=9, index=index, num_rollouts=8)
    team.start(0, 2)
    team.start(1, 2)
    for _ in range(int(rng.integers(2, 12))):
        if not team.step((0, 0) if rng.random() < 0.5 else (1, 0)):
            break
    tail: list = []
    if (0, 0) in team.crews:
        (running,) = team.crews.pop((0, 0)).running
        tail = [walk for request in running.pending for walk in getattr(request, "publish", ())]
        team.start(0, 2, incarnation=1)
    for _ in range(3):
        if (0, 1) in team.crews:
            team.step((0, 1))
    store.add(KEY, tail)
    team.finish(rng)
    return merge_members(team.results), store


def test_a_restarted_member_does_what_is_missing_and_stays_unbiased():
    rng = np.random.default_rng(0)
    results = []
    late = 0
    for index in range(1000):
        result, store = crashed(index, rng)
        walks = store.walks(KEY)
        late += sum(place < 0 for place in places(walks, f"r/{index}"))
        assert result.complete and len(walks) >= 8
        assert len({walk.noise for walk in walks}) == len(walks)
        results.append(result)
    values = ratios(results)
    assert late > 30
    assert abs(values.mean() - 1) < 4 * values.std() / np.sqrt(len(values)) < 0.06


def test_a_crashed_members_walks_are_billed_once():
    store = EvidenceStore()
    team = Team("C", store, num_rollouts=12)
    team.start(0, 2)
    team.start(1, 2)
    for _ in range(5):
        team.step((0, 0))
    del team.crews[0, 0]
    seen = store.held(KEY)["r/0/0/0"]
    assert 1 <= seen < 6
    team.start(0, 2, incarnation=1)
    result = merge_members(team.finish(np.random.default_rng(0)))
    assert result.rollouts == 12
    assert store.held(KEY) == {"r/0/0/0": seen, "r/0/0/1": 6 - seen, "r/0/1/0": 6}
    assert 0 < result.nfe <= team.model.nfe


def test_lost_shares_are_named():
    team = Team("C", EvidenceStore(), num_rollouts=12)
    for searcher in range(3):
        team.start(searcher, 3)
        while (searcher, 0) in team.crews:
            team.step((searcher, 0))
        team.store = EvidenceStore()
    with pytest.raises(MissingWalksError, match="incarnation") as caught:
        merge_members(team.results)
    assert caught.value.searchers == pickle.loads(pickle.dumps(caught.value)).searchers == (1, 2)
    for searcher in caught.value.searchers:
        team.start(searcher, 3, incarnation=1)
    team.finish(np.random.default_rng(0))
    team.start(0, 3, incarnation=1)
    assert merge_members(team.finish(np.random.default_rng(0))).complete


def test_budgets_in_nfe_or_time_are_shared_and_not_called_unbiased():
    (result,) = run_teams("C", 200, 4, max_nfe=120, wave_size=2)
    assert result.complete and not result.log_z_unbiased
    assert 80 <= result.nfe <= 120 + 4 * 2 * 6
    assert result.rollouts < 200
    (timed,) = run_teams("C", 8, 2, time_budget_s=1000.0)
    assert timed.complete and not timed.log_z_unbiased
    (loose,) = run_teams("C", 8, 2, max_nfe=48)
    assert loose.complete and loose.log_z_unbiased
    (unlimited,) = run_teams("C", None, 2, max_nfe=60)
    assert unlimited.complete and not unlimited.log_z_unbiased


def test_the_fall_draw_works_in_teams():
    (result,) = run_teams("A", 200, 4, draw="fall", num_samples=30)
    assert len(result.samples) == 30
    assert all(s.reward == toy("A").rewards[toy("A").index(s.tokens)] for s in result.samples)


class Scaled:
    """A toy's reward as two terms under multipliers of one's own."""

    def __init__(self, model: Toy, **multipliers: float) -> None:
        self._model = model
        self.multipliers = multipliers

    def components(self, samples):
        (term,) = self._model.components(samples).values()
        return {"toy": term, "first": np.array([s.tokens[0] / 30.0 for s in samples])}


def test_reweighting_agrees_with_a_fresh_search_within_its_stated_error():
    """Evidence at (lambda 5, gamma .5) against fresh searches and the exact answer at (4, 1): unit spread of z-scores."""
    model = toy("D")
    multipliers = {"toy": 1.0, "first": 1.0}
    old = run_teams("D", 150, 2, runs=120, wave_size=4, reward=Scaled(model, toy=1.0, first=0.5))
    new = run_teams(
        "D",
        150,
        1,
        runs=120,
        wave_size=4,
        seed=2,
        inverse_temperature=4.0,
        reward=Scaled(model, **multipliers),
    )
    calls = model.nfe
    firsts = np.arange(len(model.target)) // model.vocab_size**2
    exact = np.logaddexp.reduce(model.log_prior + 4.0 * (model.rewards + firsts / 30.0))
    found = [reweigh(walks_of(run.snapshot, "run"), multipliers, 4.0) for run in old]
    assert model.nfe == calls
    for other, error in [
        ([exact] * 120, np.zeros(120)),
        ([r.log_z for r in new], [r.log_z_error for r in new]),
    ]:
        scores = np.expm1([f.log_z - z for f, z in zip(found, other, strict=True)])
        scores /= np.hypot([f.log_z_error for f in found], error)
        assert 0.8 < scores.std() < 1.3
        assert abs(scores.mean()) < 4 * scores.std() / np.sqrt(120)


def evidence_of(results: list[SearchResult], run: str) -> EvidenceStore:
    """What runs keep: the walks of problem i under key "i"."""
    store = EvidenceStore()
    for i, result in enumerate(results):
        store.add(str(i), walks_of(result.snapshot, run))
    return store


@pytest.mark.parametrize("searchers", [1, 2])
def test_a_warm_start_at_another_lambda_is_unbiased(searchers):
    """Old walks at lambda 2, of which some were made by teams; new ones at 5; noise of one seed throughout."""
    old = evidence_of(run_teams("U", 4, 1, runs=1000, inverse_temperature=2.0, seed=1), "old")
    new = run_teams("U", 4, searchers, runs=1000, warm=old, run="new", seed=1)
    values = ratios(new)
    assert all(run.complete and run.log_z_unbiased and run.rollouts == 4 for run in new)
    assert all(len(walks_of(run.snapshot, "x")) == 8 for run in new)
    assert abs(values.mean() - 1) < 4 * values.std() / np.sqrt(len(values)) < 0.1


def test_a_warm_start_repeats_no_noise_and_keeps_old_walks_first():
    old = evidence_of(run_teams("U", 4, 2, inverse_temperature=2.0), "old")
    (new,) = run_teams("U", 4, 2, warm=old, run="new")
    (newer,) = run_teams("U", 4, 2, warm=evidence_of([new], "x"), run="newer")
    walks = walks_of(newer.snapshot, "x")
    place = places(walks, "newer/0")
    assert len({walk.noise for walk in walks}) == len(walks) == 12
    for first, second in [("r/0", "new/0"), ("new/0", "newer/0")]:
        teams = [max(p for p, w in zip(place, walks, strict=True) if w.team == first),
                 min(p for p, w in zip(place, walks, strict=True) if w.team == second)]  # fmt: skip
        assert (teams[0] < teams[1]) == (second == "newer/0" or first < second)


def test_a_warm_start_from_everything_costs_nothing():
    old = evidence_of([run_toy("A", "residual_ts", 0, num_rollouts=2000, wave_size=16)], "old")
    (result,) = run_teams("A", 100, 1, warm=old, inverse_temperature=1.0)
    assert result.exhausted and result.nfe == result.rollouts == result.cost.reward_calls == 0
    expected = np.logaddexp.reduce(toy("A").log_prior + toy("A").rewards)
    assert result.log_z == pytest.approx(expected, abs=1e-9)


def test_walks_that_share_noise_do_not_count_as_independent():
    """Two solo runs of one seed at nearby lambdas repeat each other: their union is hardly surer than one of them."""
    runs = [
        run_toy("D", "residual_ts", 4, num_rollouts=60, inverse_temperature=t) for t in (5.0, 5.0)
    ]
    alone = reweigh(walks_of(runs[0].snapshot, "a"), {"toy": 1.0}, 5.0)
    both = reweigh(
        walks_of(runs[0].snapshot, "a") + walks_of(runs[1].snapshot, "b"), {"toy": 1.0}, 5.0
    )
    assert both.log_z_error > 0.9 * alone.log_z_error


def test_sharing_that_cannot_be_is_refused():
    process = TokenProcess(toy("A"), toy("A").law, 4)
    problem = SearchProblem(0, process.root([0]), toy("A"))
    for method, plan, word in [
        ("dts", SharingPlan("r", {0: "k"}, 2), "searchers_per_problem: 2"),
        ("snis", SharingPlan("r", {0: "k"}, 1, EvidenceStore()), "warm_start"),
    ]:
        with pytest.raises(ConfigurationError, match=f"{word}.*residual_ts"):
            list(run_searches(process, [problem], method=method, options={}, seed=0, sharing=plan))
    (shared,) = run_teams("A", 8, 2)
    with pytest.raises(ConfigurationError, match="resume"):
        list(run_searches(
            process, [problem], method="residual_ts", options={}, seed=0, resume=shared.snapshot,
            sharing=SharingPlan("r", {0: "k"}, 2),
        ))  # fmt: skip


def test_a_plan_with_nothing_to_share_is_the_search_on_its_own():
    alone = run_toy("C", "residual_ts", 1, num_rollouts=40, wave_size=4)
    for warm in (None, EvidenceStore()):
        (planned,) = run_teams("C", 40, 1, wave_size=4, warm=warm)
        assert (planned.samples, planned.log_z, planned.nfe) == (
            alone.samples,
            alone.log_z,
            alone.nfe,
        )
