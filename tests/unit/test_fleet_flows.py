"""Flows in a fleet without Ray: one process's samples whoever dies, versions that a search keeps, and refusals.

See docs/architecture/fleet.md, docs/concepts/flow.md.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sdt_dist.actors.config import fleet_config
from sdt_dist.actors.controller.controller import Controller
from sdt_dist.actors.controller.flows import FlowLibrary
from sdt_dist.actors.controller.slots import Held
from sdt_dist.actors.work import LATEST
from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.flow.files import FlowFiles
from sdt_dist.flow.flow import Flow
from sdt_dist.models.card import card_of
from sdt_dist.models.loading import load_model
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import RolloutRequest, Root, Tilt
from tests.fleet_helpers import QUICK, TOY, PlainBackend, alone, run_controller, same, toy_work
from tests.flow_helpers import save_small_flow
from tests.http_helpers import TOKEN, RunningServer

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {name: {"num_samples": 4, "num_rollouts": 40} for name in ("s_adt", "smc", "snis")}
LONG = {"s_adt": {"num_samples": 4, "num_rollouts": 150}}


def _load() -> Toy:
    return Toy(*TOY)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[FlowFiles]:
    """Three flows of the toy."""
    folder = tmp_path_factory.mktemp("flows")
    card = card_of(_load())
    return [
        save_small_flow(folder / str(seed), card, 4, reward="toy", seed=seed) for seed in range(3)
    ]


def _work(methods, count, flow):
    return [replace(one, flow=flow) for one in toy_work(_load(), methods, count)]


def _run(work, backend, flows, meanwhile=None, **fleet):
    return asyncio.run(
        run_controller(work, backend, fleet_config(fleet), 4, meanwhile, flows=flows)
    )


@pytest.mark.parametrize(("searchers", "servers"), [(1, 1), (2, 2)])
def test_a_fleet_proposes_with_a_flow_as_one_process_does(files, searchers, servers):
    flow = Flow.of(files[0])
    with_flow = _work(METHODS, 3, flow.identity)
    without = [
        replace(w, name=f"plain/{w.name}", flow=None) for w in with_flow if w.method != "s_adt"
    ]
    work = [*with_flow, *without]
    outcomes = _run(work, PlainBackend(_load), files[:1], searchers=searchers, servers=servers)
    assert outcomes.keys() == {w.name for w in work}
    for w in work:
        want = alone(_load(), w, flow if w.flow else None)
        assert same(outcomes[w.name], want) and outcomes[w.name].nfe == want.nfe, w.name
        assert outcomes[w.name].flow == w.flow
    assert any(
        not same(outcomes[f"plain/{w.name}"], alone(_load(), w, flow))
        for w in with_flow
        if w.method == "snis"
    )


@pytest.mark.parametrize("victim", ["model-server-0", "searcher-0"])
def test_deaths_change_no_sample_and_a_new_server_has_its_flows_before_it_is_asked(files, victim):
    flow = Flow.of(files[0])
    work = _work(LONG, 12, flow.identity)
    backend = PlainBackend(_load)
    kills = []

    async def kill(controller):
        while len(kills) < 3:
            await asyncio.sleep(0.05)
            status = controller.status()
            if (
                status["done"] >= 3 * len(kills)
                and status["slots"][victim]["state"] == "ready"
                and status["under_way"]
            ):
                backend.alive[victim].die()
                kills.append(status["done"])

    outcomes = _run(
        work, backend, files[:1], kill, searchers=2, problems_per_searcher=3, max_attempts=50
    )
    assert len(kills) > 1 and backend.spawned.count(victim) > 1
    assert [w.name for w in work if not same(outcomes[w.name], alone(_load(), w, flow))] == []


def test_lost_messages_lose_no_flow(files):
    work = _work(METHODS, 3, files[1].identity)
    outcomes = _run(work, PlainBackend(_load, loss=0.25, seed=3), files, searchers=2)
    assert all(same(outcomes[w.name], alone(_load(), w, Flow.of(files[1]))) for w in work)


def test_searches_begin_with_the_newest_flow_and_keep_it_at_later_attempts_and_old_ones_go(files):
    work = _work(LONG, 12, LATEST)
    backend = PlainBackend(_load)
    seen = {}

    async def publish(controller):
        while controller.status()["done"] < 2:
            await asyncio.sleep(0.005)
        seen["first"] = {lease.work.name for lease in controller._leases.under_way.values()}
        await controller.load_flow(files[1])
        await controller.load_flow(files[1])  # whoever asked did not get the reply
        seen["held"] = set(backend.alive["model-server-0"].target.server.model._flows._flows)
        backend.alive["searcher-0"].die()
        backend.alive["model-server-0"].die()
        while controller.status()["done"] < 12:
            await asyncio.sleep(0.005)
            if (server := backend.alive.get("model-server-0")) is not None:
                seen["last"] = set(server.target.server.model._flows._flows)

    outcomes = _run(work, backend, files[:1], publish, problems_per_searcher=3, max_attempts=50)
    by_name = {f.identity: Flow.of(f) for f in files}
    assert all(
        same(outcomes[w.name], alone(_load(), w, by_name[outcomes[w.name].flow])) for w in work
    )
    assert {outcomes[name].flow for name in seen["first"]} == {files[0].identity}
    assert [o.flow for o in outcomes.values()].count(files[1].identity) >= 6
    assert seen["held"] == {files[0].identity, files[1].identity} and seen["last"] == {
        files[1].identity
    }


def test_a_version_that_servers_are_being_told_of_is_not_retired_meanwhile(files):
    """No search can name it yet, and searches that end let the library look for flows to forget."""

    class Telling:
        is_ready = True
        held = Held()

        async def ask(self, method, timeout_s, *arguments):
            library.retire([])

    library = FlowLibrary(files[:1], [Telling()], 1.0)  # type: ignore[list-item]
    asyncio.run(library.publish(files[1], None))
    assert library.latest == files[1].identity and library.latest_version == 1 and len(library) == 2


def test_a_further_flow_that_does_not_fit_is_refused_and_the_run_goes_on(files, tmp_path):
    other = save_small_flow(tmp_path / "other", card_of(Toy(5, 4, 2.0)), 4, reward="toy")
    damaged = FlowFiles(files[1].info_text, files[2].weights)
    work = _work(LONG, 8, LATEST)
    said = []

    async def publish(controller):
        while controller.status()["done"] < 1:
            await asyncio.sleep(0.005)
        for wrong in (other, damaged):
            with pytest.raises(CheckpointError) as error:
                await controller.load_flow(wrong)
            said.append(str(error.value))
        said.append(controller._flows.latest)

    outcomes = _run(work, PlainBackend(_load), files[:1], publish, problems_per_searcher=2)
    assert "trained for model" in said[0] and "the files of two versions" in said[1]
    assert said[2] == files[0].identity and {o.flow for o in outcomes.values()} == {
        files[0].identity
    }


class Flowless:
    """A toy in a backend that cannot hold flows."""

    nfe = model_calls = 0

    def __init__(self) -> None:
        toy = _load()
        self.vocab_size = toy.vocab_size
        self.max_context = toy.max_context
        self.deterministic = True
        self.law = toy.law
        self.log_prob_tables = toy.log_prob_tables
        self.expand = toy.expand
        self.rollout = toy.rollout
        self.release = toy.release


def test_flows_that_the_fleet_cannot_use_end_the_run_at_its_start(files, tmp_path):
    other = save_small_flow(tmp_path / "other", card_of(Toy(5, 4, 2.0)), 4, reward="toy")
    with pytest.raises(
        CheckpointError,
        match=r"trained for model [0-9a-f]{32}, 'Toy' is [0-9a-f]{32}; give the model",
    ):
        _run(_work(LONG, 2, other.identity), PlainBackend(_load), [other])
    damaged = FlowFiles(files[1].info_text, files[2].weights)
    with pytest.raises(CheckpointError, match="the files of two versions, or damage"):
        _run(_work(LONG, 2, damaged.identity), PlainBackend(_load), [damaged])
    with pytest.raises(ConfigurationError, match="flow: Flowless cannot hold flow networks"):
        _run(_work(LONG, 2, files[0].identity), PlainBackend(Flowless), files[:1])


@pytest.mark.parametrize("name", ["no such flow", LATEST])
def test_work_that_names_a_flow_which_was_not_given_is_refused(name):
    with pytest.raises(
        ConfigurationError,
        match=f"work s_adt/0: flow '{name}', the fleet has none; give it as flows",
    ):
        Controller(
            fleet_config({}),
            PlainBackend(_load),
            _work(LONG, 1, name),
            max_new_tokens=4,
            policy=QUICK,
        )


def _reach(url, made):
    made.append(load_model(url))
    return made[-1]


def test_a_server_over_http_must_hold_the_flow_itself(files, monkeypatch):
    monkeypatch.setenv("SDT_HTTP_TOKEN", TOKEN)
    work = _work(METHODS, 2, files[0].identity)
    remotes = []
    model = _load()
    flow = Flow.of(files[0])
    model.load_flow(Flow.of(files[0]))
    try:
        with RunningServer(model, card_of(model), flows=[flow.identity]) as server:
            outcomes = _run(work, PlainBackend(lambda: _reach(server.url, remotes)), files[:1])
            assert all(same(outcomes[w.name], alone(_load(), w, flow)) for w in work)
            with pytest.raises(
                ConfigurationError,
                match=rf"which has {flow.identity}; start it with `sdt serve --flow",
            ):
                remotes[0].process(4).load_flow(Flow.of(files[1]))
        with RunningServer(_load(), card_of(model)) as server:
            said = rf"flow: {flow.identity} is not held by the server at {server.url}, which has none; start it with"
            with pytest.raises(ConfigurationError, match=said):
                _run(work, PlainBackend(lambda: _reach(server.url, remotes)), files[:1])
    finally:
        for remote in remotes:
            remote.model.close()


def test_a_server_that_drops_a_flow_says_that_it_does_not_hold_it(files):
    model = _load()
    name = files[0].identity
    model.load_flow(Flow.of(files[0]))
    asked = [RolloutRequest(Root((0,), b"x"), (), 4, 1, tilt=Tilt(name, 5.0, "q"))]
    assert model.rollout(asked, model.law)[0].log_proposal is not None
    model.drop_flow(name)
    model.drop_flow(name)
    with pytest.raises(
        ConfigurationError, match=f"flow '{name}' is not held by this model, which has none"
    ):
        model.rollout(asked, model.law)
