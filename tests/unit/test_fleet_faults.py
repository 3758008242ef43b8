"""The controller without Ray against what fails again and again: poison, silence, bugs, and lost reports.

See docs/architecture/fleet.md.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest

from sdt_dist.actors.config import fleet_config
from sdt_dist.actors.controller.controller import Controller
from sdt_dist.actors.work import GivenReward
from sdt_dist.errors import ConfigurationError, FleetError
from sdt_dist.models.toy import Toy
from sdt_dist.parts import TokensPart
from tests.fleet_helpers import (
    QUICK,
    TOY,
    PlainBackend,
    SearcherTarget,
    ServerTarget,
    alone,
    run_controller,
    same,
    toy_work,
)

POISON = 3  # the first token of a prompt
METHODS = {"residual_ts": {"num_samples": 4, "num_rollouts": 40}}


def _load() -> Toy:
    return Toy(*TOY)


def _run(work, backend, *, meanwhile=None, timeout_s=60.0, **fleet):
    return asyncio.run(run_controller(work, backend, fleet_config(fleet), 4, meanwhile, timeout_s))


def _check_all_but(name: str, work, outcomes) -> str:
    """Every other search gave the samples of one process; the message of this one's failure."""
    assert outcomes.keys() == {w.name for w in work}
    bad = [w.name for w in work if w.name != name and not same(outcomes[w.name], alone(_load(), w))]
    assert not bad
    assert isinstance(outcomes[name], FleetError)
    return str(outcomes[name])


@dataclass
class Deadly:
    """Recipe and reward of a search that kills its searcher."""

    model: Toy
    backend: PlainBackend
    controller: Controller | None = None
    kills: int = 0

    multipliers = property(lambda self: self.model.multipliers)

    def build(self, context):
        return self

    def components(self, samples):
        victim = self.controller._leases.under_way["residual_ts/3"].slot.name
        self.backend.alive[victim].die()
        self.kills += 1
        return self.model.components(samples)


@pytest.mark.parametrize("searchers", [1, 3])
def test_a_problem_that_kills_its_searchers_is_set_aside_and_every_other_is_finished(searchers):
    backend = PlainBackend(_load)
    deadly = Deadly(_load(), backend)
    work = [
        replace(w, reward=deadly) if w.problem == 3 else w for w in toy_work(_load(), METHODS, 12)
    ]

    async def tell(controller):
        deadly.controller = controller

    outcomes = _run(work, backend, meanwhile=tell, searchers=searchers, problems_per_searcher=4)
    message = _check_all_but(
        "residual_ts/3", [replace(w, reward=GivenReward(_load())) for w in work], outcomes
    )
    assert (
        deadly.kills == 5
        and "set aside after 5 attempts" in message
        and "searcher-" in message
        and "died" in message
    )


class Fragile(Toy):
    """A model whose process dies of one prompt."""

    die: Any = None

    def compute_rows(self, sequences):
        if any(sequence[0] == POISON for sequence in sequences):
            self.die()
            raise RuntimeError("dead by now")
        return super().compute_rows(sequences)


class FragileBackend(PlainBackend):
    """Its models can kill their endpoints, from their own thread."""

    def spawn(self, kind, index, incarnation):
        endpoint = super().spawn(kind, index, incarnation)
        if isinstance(endpoint.target, ServerTarget):
            loop = asyncio.get_running_loop()
            endpoint.target.server.model.die = lambda: loop.call_soon_threadsafe(endpoint.die)
        return endpoint


@pytest.mark.parametrize(("searchers", "servers"), [(1, 1), (2, 1), (3, 2)])
def test_a_request_that_kills_model_servers_fails_only_its_own_problem(searchers, servers):
    work = toy_work(_load(), METHODS, 12)
    work[3] = replace(work[3], context=(TokensPart((POISON,)),))
    backend = FragileBackend(lambda: Fragile(*TOY))
    outcomes = _run(work, backend, searchers=searchers, servers=servers, problems_per_searcher=4)
    message = _check_all_but(work[3].name, work, outcomes)
    assert "set aside after 5 attempts" in message and "model servers died" in message


class SilentTo(ServerTarget):
    """A model server that never answers one prompt, and answers its probes."""

    def __init__(self, loaded, name):
        super().__init__(loaded, name)
        self.answer = self._answer

    async def _answer(self, call):
        if POISON in call.packed["prompt"]:
            await asyncio.Event().wait()
        return await self.server.answer(call)


class SilentBackend(PlainBackend):
    def _make(self, kind, name):
        return SilentTo(self._load(), name) if kind == "model-server" else super()._make(kind, name)


@pytest.mark.parametrize(
    ("deadlines", "words"),
    [
        ({"call_timeout_s": 0.6}, ["waited 1 s for answer of model-server-0"]),
        ({"problem_timeout_s": 0.3}, ["no progress for", "requests at model-server-0"]),
    ],
)
def test_a_search_that_no_server_answers_ends_at_its_deadline_and_says_what_it_waited_for(
    deadlines, words
):
    work = toy_work(_load(), METHODS, 3)
    work[1] = replace(work[1], context=(TokensPart((POISON,)),))
    outcomes = _run(work, SilentBackend(_load), max_attempts=3, **deadlines)
    message = _check_all_but(work[1].name, work, outcomes)
    assert all(word in message for word in ["set aside after 3 attempts", *words]), message


def test_results_are_given_until_they_are_acknowledged_and_counted_once():
    work = toy_work(_load(), METHODS, 3)
    backend = PlainBackend(_load)

    async def run():
        controller = Controller(fleet_config({}), backend, work, max_new_tokens=4, policy=QUICK)
        controller.start()
        controller.start()  # whoever asked did not get the reply
        async with asyncio.timeout(30):
            while len((report := await controller.next_report([], 0.5)).results) < 3:
                await asyncio.sleep(0.01)
            first = dict(report.results)
            again = dict((await controller.next_report([], 0.5)).results)
            one = await controller.next_report(["residual_ts/1"], 0.5)
            repeated = await controller.next_report(["residual_ts/1"], 0.5)
            assert not repeated.finished
            last = await controller.next_report(
                ["residual_ts/0", "residual_ts/1", "residual_ts/2"], 0.5
            )
        await controller.stop()
        return first, again, dict(one.results), dict(repeated.results), last

    first, again, one, repeated, last = asyncio.run(run())
    assert first == again and one == repeated and one.keys() == {"residual_ts/0", "residual_ts/2"}
    assert last.finished and last.results == []
    assert (last.status["done"], last.status["failed"], last.status["total"]) == (3, 0, 3)
    assert last.status["under_way"] == last.status["waiting"] == 0
    assert sorted(backend.spawned) == ["model-server-0", "searcher-0"]


def test_nothing_to_do_is_finished_at_once():
    assert _run([], PlainBackend(_load), timeout_s=5.0) == {}


def _broken() -> Toy:
    raise FileNotFoundError("no weights here")


def test_a_model_that_never_loads_ends_the_run_and_says_why():
    with pytest.raises(
        FleetError, match=r"no model-server can be started; model-server-\d: .*no weights here"
    ):
        _run(toy_work(_load(), METHODS, 2), PlainBackend(_broken), servers=2, timeout_s=20.0)


class Misled(SearcherTarget):
    """A searcher that cannot search the model."""

    def __init__(self, name):
        super().__init__(name)
        self.configure = self._refuse

    async def _refuse(self, settings, routes):
        raise ConfigurationError("top_k: 0, allowed: >= 1")


class MisledBackend(PlainBackend):
    def _make(self, kind, name):
        return Misled(name) if kind == "searcher" else super()._make(kind, name)


def test_settings_that_no_searcher_can_use_end_the_run_and_say_why():
    with pytest.raises(FleetError, match=r"searcher-0 cannot search this model: top_k: 0"):
        _run(toy_work(_load(), METHODS, 2), MisledBackend(_load), timeout_s=20.0)


class BuggyBackend(PlainBackend):
    """A status that breaks the controller's own code."""

    def _make(self, kind, name):
        target = super()._make(kind, name)
        if kind == "searcher":

            async def status():
                return {}

            target.status = status
        return target


def test_a_failure_of_the_controller_itself_ends_the_run_instead_of_hanging():
    work = toy_work(_load(), {"residual_ts": {"num_samples": 4, "num_rollouts": 2000}}, 8)
    with pytest.raises(FleetError, match="the controller failed: KeyError: 'under_way'"):
        _run(work, BuggyBackend(_load), timeout_s=20.0)


def test_a_fleet_that_is_stopped_leaves_no_actor_and_no_task():
    backend = PlainBackend(_load)

    async def run():
        controller = Controller(
            fleet_config({"searchers": 3, "servers": 2}),
            backend,
            toy_work(_load(), METHODS, 40),
            max_new_tokens=4,
            policy=QUICK,
        )
        controller.start()
        while controller.status()["done"] < 2:
            await controller.next_report([], 0.01)
        assert len(backend.alive) == 5
        await controller.stop()
        assert backend.alive == {}
        await asyncio.sleep(0.1)
        return asyncio.all_tasks() - {asyncio.current_task()}

    left = asyncio.run(run())
    assert backend.alive == {}
    assert [
        task for task in left if task.get_coro().__qualname__.startswith(("Controller.", "Slot."))
    ] == []
