"""A fleet whose servers are of several kinds: one p, valid results marked not deterministic, replacements in kind.

See docs/architecture/search.md, docs/architecture/fleet.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp

from sdt_dist.actors.calls import Routes
from sdt_dist.actors.config import FleetConfig, fleet_config
from sdt_dist.actors.controller.agreement import Agreement
from sdt_dist.actors.endpoint import Endpoint
from sdt_dist.actors.searcher import Searcher, SearcherSettings
from sdt_dist.errors import ConfigurationError, FleetError
from sdt_dist.models.card import ModelCard, card_of
from sdt_dist.models.toy import Toy
from sdt_dist.search.methods import method_names
from sdt_dist.search.result import SearchResult
from sdt_dist.search.sharing_plan import SharingPlan, merge_members
from tests.fleet_helpers import (
    TOY,
    PlainBackend,
    ServerTarget,
    alone,
    run_controller,
    same,
    toy_work,
)

METHODS = {
    name: {"num_samples": 4} | ({} if name in ("greedy", "sample") else {"num_rollouts": 40})
    for name in method_names()
}
FEW = {"residual_ts": METHODS["residual_ts"]}
OTHER = {"model": "mlx:/models/toy"}


class Inexact(Toy):
    """The same p in another arithmetic, which promises no bits."""

    deterministic = False

    def __init__(self) -> None:
        super().__init__(*TOY)
        rng = np.random.default_rng(5)
        tables = [table + 1e-4 * rng.standard_normal(table.shape) for table in self.log_prob_tables]
        self.log_prob_tables = [
            table - np.asarray(logsumexp(table, axis=1, keepdims=True)) for table in tables
        ]


class Smaller(Toy):
    """Another model."""

    def __init__(self) -> None:
        super().__init__(TOY[0] - 1, *TOY[1:])


def _exact() -> Toy:
    return Toy(*TOY)


class GroupedBackend(PlainBackend):
    """Model servers as the fleet's groups say: `loads` has a loader a group, `loaded` the groups in the order of starts."""

    def __init__(self, config: FleetConfig, *loads: Callable[[], Any], **options: Any) -> None:
        super().__init__(loads[0], **options)
        self._groups = config.group_of_server
        self._loads = loads
        self.loaded = list[tuple[str, int]]()

    def _make(self, kind, name):
        if kind != "model-server":
            return super()._make(kind, name)
        group = self._groups[int(name.rpartition("-")[2])]
        self.loaded.append((name, group))
        return ServerTarget(self._loads[group](), name)


def _fleet(*groups: dict[str, Any], **sizes: Any) -> FleetConfig:
    return fleet_config({"more_servers": list(groups)} | sizes)


def _run(work, backend, config, meanwhile=None, timeout_s=60.0):
    return asyncio.run(run_controller(work, backend, config, 4, meanwhile, timeout_s))


def _check_valid(outcomes, model: Toy) -> None:
    """Every result is whole and finite, its samples have the rewards and (nearly) the log p of the model."""
    for name, outcome in outcomes.items():
        assert isinstance(outcome, SearchResult), (name, outcome)
        assert outcome.deterministic is False, name
        assert sum(outcome.weights) == pytest.approx(1.0) and np.isfinite(outcome.weights).all()
        for sample in outcome.finished:
            place = model.index(sample.tokens)
            assert sample.reward == model.rewards[place]
            assert sample.log_prob == pytest.approx(model.log_prior[place], abs=1e-2)
        if outcome.log_z is not None:
            assert np.isfinite(outcome.log_z)


def test_servers_that_promise_only_seeds_make_valid_results_that_say_so():
    config = _fleet(OTHER, searchers=2)
    backend = GroupedBackend(config, _exact, Inexact)
    rows = {}

    async def look(controller):
        while True:
            rows.update({slot.name: slot.status.get("rows", 0) for slot in controller._servers})
            await asyncio.sleep(0.01)

    outcomes = _run(toy_work(_exact(), METHODS, 6), backend, config, look)
    assert len(outcomes) == 6 * len(METHODS)
    _check_valid(outcomes, _exact())
    assert backend.loaded == [("model-server-0", 0), ("model-server-1", 1)]
    # one row is the probe
    assert rows.keys() == {"model-server-0", "model-server-1"} and min(rows.values()) > 1


def test_two_kinds_that_each_repeat_themselves_still_promise_only_seeds():
    config = _fleet(OTHER)
    outcomes = _run(toy_work(_exact(), FEW, 4), GroupedBackend(config, _exact, _exact), config)
    _check_valid(outcomes, _exact())


def test_a_server_of_the_same_group_that_promises_only_seeds_marks_all_results():
    """It joins after searchers were told of the first one, and before any search begins."""
    loads = iter([_exact(), Inexact()])
    outcomes = _run(
        toy_work(_exact(), FEW, 4), PlainBackend(lambda: next(loads)), fleet_config({"servers": 2})
    )
    _check_valid(outcomes, _exact())


def test_results_are_marked_from_when_a_route_to_such_a_server_is_given():
    async def run():
        searcher = Searcher("searcher-0")
        server = ServerTarget(_exact(), "model-server-0")

        class Direct(Endpoint):
            async def call(self, method, *arguments, timeout_s):
                return await getattr(server, method)(*arguments)

        card = card_of(_exact())
        routes = Routes((Direct("model-server-0"),), (0, 0))
        work = toy_work(_exact(), FEW, 3)
        found = []
        for one, deterministic in zip(work, (True, False, True), strict=True):
            settings = SearcherSettings(replace(card, deterministic=deterministic), 4)
            await searcher.configure(settings, routes)
            found.append((await searcher.search(one)).deterministic)
        server.stop()
        return found

    assert asyncio.run(run()) == [True, False, False]


def test_one_group_of_equal_servers_stays_deterministic_bit_by_bit():
    work = toy_work(_exact(), FEW, 4)
    outcomes = _run(work, PlainBackend(_exact), fleet_config({"servers": 2, "searchers": 2}))
    assert all(
        same(outcomes[w.name], alone(_exact(), w)) and outcomes[w.name].deterministic for w in work
    )


@pytest.mark.parametrize("loads", [(_exact, Smaller), (Smaller, _exact)])
def test_a_group_with_another_vocabulary_ends_the_run_before_any_search(loads):
    config = _fleet(OTHER)
    begun = time.monotonic()
    backend = GroupedBackend(config, *loads)
    with pytest.raises(FleetError) as error:
        _run(toy_work(_exact(), FEW, 2), backend, config, timeout_s=20.0)
    said = str(error.value)
    assert said.startswith("model servers disagree on vocab_size: model-server-")
    sizes = [load().vocab_size for load in loads]
    assert f"model-server-0 (the run's own model) has {sizes[0]}" in said
    assert f"model-server-1 (more_servers.0, mlx:/models/toy) has {sizes[1]}" in said
    assert "give each a copy of it" in said
    assert len(backend.loaded) == 2 and time.monotonic() - begun < 10, (
        "starting it again cannot help"
    )


def test_one_odd_server_among_others_of_its_group_is_refused_and_the_run_goes_on():
    first_is_known = asyncio.Event()
    reasons = set()

    class OddSecond(PlainBackend):
        """The second server tells its model after the first: of two, whoever is first decides which is the odd one."""

        def _make(self, kind, name):
            if name != "model-server-1":
                return super()._make(kind, name)
            target = ServerTarget(Smaller(), name)
            target.card = lambda card=target.card: self._card(card)
            return target

        async def _card(self, card):
            await first_is_known.wait()
            return await card()

    work = toy_work(_exact(), {"residual_ts": {"num_samples": 4, "num_rollouts": 300}}, 8)

    async def look(controller):
        while True:
            if controller._agreement.knows(0):
                first_is_known.set()
            reasons.add(controller._servers[1].health.reason)
            await asyncio.sleep(0.005)

    outcomes = _run(work, OddSecond(_exact), fleet_config({"servers": 2}), look)
    assert all(
        same(outcomes[w.name], alone(_exact(), w)) and outcomes[w.name].deterministic for w in work
    )
    assert any(
        "disagree on vocab_size" in r and "the same model under the same name" in r for r in reasons
    ), reasons


def test_who_replaces_a_dead_server_is_of_its_group_and_results_stay_valid():
    config = _fleet(OTHER, servers=2, searchers=2, max_attempts=50)
    backend = GroupedBackend(config, _exact, Inexact)
    kills = []

    async def kill(controller):
        while len(kills) < 6:
            await asyncio.sleep(0.03)
            name = f"model-server-{1 + len(kills) % 2}"
            if name in backend.alive and controller.status()["under_way"]:
                backend.alive[name].die()
                kills.append(name)

    work = toy_work(_exact(), {m: METHODS[m] for m in ("residual_ts", "dts", "mcts", "smc")}, 12)
    outcomes = _run(work, backend, config, kill)
    _check_valid(outcomes, _exact())
    assert len(kills) == 6 and len(backend.loaded) > 3
    assert {(name, group) for name, group in backend.loaded} == {
        ("model-server-0", 0),
        ("model-server-1", 0),
        ("model-server-2", 1),
    }


def _broken() -> Toy:
    raise FileNotFoundError("no weights on this node")


def test_a_group_that_never_gets_ready_ends_the_run_and_says_which():
    config = _fleet(OTHER, {"model": "http://127.0.0.1:8011", "count": 2}, servers=2)
    match = r"no model-server of more_servers.1, http://127.0.0.1:8011 can be started; model-server-[34]: .*no weights on"
    with pytest.raises(FleetError, match=match):
        _run(
            toy_work(_exact(), FEW, 2),
            GroupedBackend(config, _exact, Inexact, _broken),
            config,
            timeout_s=20.0,
        )


def test_nothing_is_searched_before_every_group_has_said_what_it_serves():
    config = _fleet(OTHER)
    opened = asyncio.Event()
    seen = []

    class Slow(GroupedBackend):
        def _make(self, kind, name):
            target = super()._make(kind, name)
            if name == "model-server-1":
                target.card = lambda card=target.card: self._card(card)
            return target

        async def _card(self, card):
            await opened.wait()
            return await card()

    async def look(controller):
        await asyncio.sleep(0.3)
        seen.append((controller.status()["done"], controller.status()["under_way"]))
        opened.set()

    _check_valid(
        _run(toy_work(_exact(), FEW, 4), Slow(config, _exact, Inexact), config, look), _exact()
    )
    assert seen == [(0, 0)]


def test_a_group_that_is_lost_for_good_later_leaves_its_work_to_the_others():
    config = _fleet(OTHER, problems_per_searcher=2)
    first = [Inexact()]
    backend = GroupedBackend(config, _exact, lambda: first.pop())
    lost = []

    async def kill(controller):
        while not controller.status()["done"]:
            await asyncio.sleep(0.005)
        backend.alive["model-server-1"].die()
        while controller._servers[1].health.state != "given up":
            await asyncio.sleep(0.005)
        lost.append(controller.status()["done"])

    work = toy_work(_exact(), {"residual_ts": {"num_samples": 4, "num_rollouts": 100}}, 24)
    _check_valid(_run(work, backend, config, kill), _exact())
    assert lost and lost[0] < 24


def test_teams_share_evidence_across_kinds_under_the_runs_own_key(tmp_path):
    """Walks of either kind are evidence for all: the store's keys name the run's model, never a server's."""
    config = _fleet(OTHER, searchers=2, shards=2)
    plan = SharingPlan("run", {i: f"key {i}" for i in range(2)}, 4)
    work = [
        replace(one, name=f"{one.name}/{member.searcher}", membership=member)
        for one in toy_work(_exact(), {"residual_ts": {"num_rollouts": 1000, "wave_size": 4}}, 2)
        for member in plan.members(one.problem)
        if member is not None
    ]
    outcomes = _run(work, GroupedBackend(config, _exact, Inexact, folder=tmp_path), config)
    _check_valid(outcomes, _exact())
    for problem in range(2):
        merged = merge_members(
            [outcomes[f"residual_ts/{problem}/{searcher}"] for searcher in range(4)]
        )
        assert merged.deterministic is False
        assert merged.log_z == pytest.approx(_exact().log_z, abs=0.01)


def _card(**changes: Any) -> ModelCard:
    spec = {"allowed": (0, 5), "end_tokens": [], "tokenizer": {"text": "{" * 500}}
    return replace(ModelCard("language", "x", "main", 5, 64, True, spec), **changes)


def test_searchers_are_told_the_runs_own_model_with_what_holds_for_every_group():
    agreement = Agreement(["the run's own model", "b"])
    agreement.add("model-server-1", 1, _card(identity="other", max_context=32))
    assert agreement.card is None and agreement.knows(1) and not agreement.knows(0)
    # a card that came over HTTP
    agreement.add("model-server-0", 0, ModelCard.from_json(_card().to_json()))
    card = agreement.card
    assert card is not None and (card.identity, card.max_context, card.deterministic) == (
        "main",
        32,
        False,
    )


@pytest.mark.parametrize(("first", "second", "group", "deterministic"), [
    ({}, {}, 0, True),
    ({}, {"deterministic": False}, 0, False),
    ({"deterministic": False}, {}, 0, False),
    ({}, {"identity": "of other bytes"}, 0, False),
])  # fmt: skip
def test_one_group_is_deterministic_where_all_its_servers_are_the_same(
    first, second, group, deterministic
):
    agreement = Agreement(["the run's own model"])
    agreement.add("model-server-0", 0, _card(**first))
    agreement.add("model-server-1", group, _card(**second))
    assert (
        agreement.deterministic is deterministic and agreement.card.deterministic is deterministic
    )


@pytest.mark.parametrize(("groups", "changed", "said"), [
    ((0, 1), {"kind": "tokens"}, r"disagree on kind: b \(mlx\) has 'tokens', a \(own\) has 'language'; every group"),
    ((0, 1), {"spec": _card().spec | {"end_tokens": [2]}}, r"on spec.end_tokens: b \(mlx\) has \[2\], a \(own\) has \[\];"),
    ((0, 1), {"spec": {"allowed": [0, 5], "end_tokens": []}}, r"on spec.tokenizer: b \(mlx\) has None, a \(own\) has \{"),
    ((1, 0), {"vocab_size": 6}, r"on vocab_size: b \(own\) has 6, a \(mlx\) has 5; every group must serve the run's own"),
    ((0, 0), {"max_context": 32}, r"on max_context: b \(own\) has 32, a \(own\) has 64; all nodes of a group must have"),
])  # fmt: skip
def test_what_is_said_of_servers_that_disagree(groups, changed, said):
    agreement = Agreement(["own", "mlx"])
    agreement.add("a", groups[0], _card())
    with pytest.raises(FleetError, match=said) as error:
        agreement.add("b", groups[1], _card(**changed))
    assert len(str(error.value)) < 500


def test_groups_and_their_servers():
    config = _fleet(
        OTHER,
        {"model": "https://mac:8011", "count": 3, "placement": {"labels": {"zone": "b"}}},
        servers=2,
    )
    assert config.group_of_server == [0, 0, 1, 2, 2, 2]
    assert config.placement_of(0) == config.server and config.placement_of(2).labels == {
        "zone": "b"
    }
    assert fleet_config({}).group_of_server == [0] and fleet_config({}).more_servers == []


@pytest.mark.parametrize(("group", "said"), [
    ({"model": "mxl:/models/x"}, r"more_servers.0.model: 'mxl:/models/x', .*unknown model backend 'mxl'. Did you mean 'mlx'"),
    ({"model": "mlx:"}, r"more_servers.0.model: 'mlx:', .*names no model"),
    ({"model": "http://10.0.0.5:8011"}, r"more_servers.0.model: .*would send the token and the prompts unencrypted"),
    ({"model": "bundled", "count": 0}, r"more_servers.0.count: 0, .*greater than or equal to 1"),
    ({"model": "bundled", "cpus": 2.0}, r"more_servers.0.cpus: 2.0, Extra inputs are not permitted"),
    ({"count": 2}, r"more_servers.0.model: .*Field required"),
])  # fmt: skip
def test_groups_that_can_be_nowhere_are_refused(group, said):
    with pytest.raises(ConfigurationError, match=said):
        _fleet(group)


def test_a_path_that_only_the_groups_nodes_have_is_not_refused_here():
    assert _fleet({"model": "/only/on/those/nodes"}).more_servers[0].count == 1
