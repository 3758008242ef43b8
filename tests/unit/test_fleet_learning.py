"""Learning in a fleet without Ray: what comes from searches, versions for later searches, deaths of learner and buffer.

See docs/architecture/fleet.md, docs/concepts/flow.md.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdt_dist.actors.config import FleetConfig, fleet_config
from sdt_dist.actors.controller.controller import Controller
from sdt_dist.actors.learner import LearningPlan, LiveLearner
from sdt_dist.actors.live_training import SearchStream, check_live
from sdt_dist.actors.searcher import Outcome
from sdt_dist.actors.trajectory_buffer import SearchRecord, Taken, TrajectoryBuffer
from sdt_dist.actors.work import GivenReward
from sdt_dist.errors import ConfigurationError, FleetError, ResultsError
from sdt_dist.flow.flow import Flow
from sdt_dist.models.process import TokenProcess
from sdt_dist.parts import TokensPart
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from sdt_dist.training.flow.collect import FinishedSearch, collect
from sdt_dist.training.flow.config import TrainFlowConfig
from sdt_dist.training.flow.learner import LOSSES_FILE
from sdt_dist.training.flow.loss_log import read_losses
from tests.fleet_helpers import QUICK, PlainBackend
from tests.flow_helpers import FamilyMember

pytestmark = pytest.mark.usefixtures("one_thread")

_load = partial(FamilyMember, (0,) * 5)
CONFIG = TrainFlowConfig(
    live=True, model="family", reward="toy", max_new_tokens=4, rounds=4, steps_per_round=12, contexts_per_round=3,
    rollouts=12, num_children=None, learning_rate=0.02, num_contexts=3, per_context=3, path=0.0,
    lowest_inverse_temperature=2.0, highest_inverse_temperature=8.0, hidden_size=8, key_size=4, context_length=5,
    patch=5, save_every=5, calibrate_every=10,
)  # fmt: skip
FLEET = fleet_config({"problems_per_searcher": 3, "max_attempts": 50, "buffer_records": 12})
NOBODY = LiveLearner("nobody", LearningPlan(CONFIG, Path(), ""))


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Curves take longer than these trainings; a test on real Ray looks at them."""
    monkeypatch.setattr("sdt_dist.training.flow.record._draw", lambda *_: None)


class Members:
    """Prompts of the family of toys."""

    description = "members"

    def draw(self, seed: int, round_number: int, count: int) -> list[Any]:
        rng = np.random.default_rng(round_number % 3)
        return [(TokensPart(tuple(rng.integers(0, 5, 5).tolist())),) for _ in range(count)]


class Run:
    """A live training in this process: what was searched with which flow, and the controller's last state."""

    def __init__(
        self,
        output: Path,
        config: TrainFlowConfig = CONFIG,
        fleet: FleetConfig = FLEET,
        **backend: Any,
    ) -> None:
        self.output = output
        self.config = config
        self.fleet = fleet
        plan = LearningPlan(config, output, "members")
        self.backend = PlainBackend(
            _load, plan=plan, buffer_records=fleet.buffer_records, **backend
        )
        self.outcomes: dict[str, Outcome] = {}
        self.status: dict[str, Any] = {}

    def learner(self) -> dict[str, Any]:
        return self.status["slots"]["learner-0"]

    def live_learner(self) -> LiveLearner | None:
        """The present incarnation, without its endpoint."""
        endpoint = self.backend.alive.get("learner-0")
        return None if endpoint is None else endpoint.target.learner

    def buffer(self) -> dict[str, Any]:
        return self.status["slots"]["trajectory-buffer-0"]

    def go(
        self,
        meanwhile: Callable[[Run], Any] | None = None,
        timeout_s: float = 60.0,
        stop_when: Callable[[LiveLearner], bool] = lambda learner: False,
    ) -> Run:
        """To the end, or until the learner is where `stop_when` says, however long that takes within `timeout_s`."""
        asyncio.run(self._go(meanwhile, timeout_s, stop_when))
        return self

    async def _go(
        self,
        meanwhile: Callable[[Run], Any] | None,
        timeout_s: float,
        stop_when: Callable[[LiveLearner], bool],
    ) -> None:
        controller = Controller(
            self.fleet, self.backend, [], max_new_tokens=4, learns=True, policy=QUICK
        )
        stream = SearchStream(
            self.config,
            Members(),
            lambda context: GivenReward(FamilyMember(context[0].ids)),
            self.fleet,
        )
        controller.start()
        side = asyncio.create_task(meanwhile(self)) if meanwhile else None
        acknowledged: list[str] = []
        try:
            async with asyncio.timeout(timeout_s):
                while not stop_when(self.live_learner() or NOBODY):
                    report = await controller.next_report(acknowledged, 0.1)
                    acknowledged = [name for name, _ in report.results]
                    assert not self.outcomes.keys() & set(acknowledged), "a result came twice"
                    self.outcomes |= dict(report.results)
                    for _, outcome in report.results:
                        stream.note(outcome)
                    self.status = report.status
                    more = stream.more(report.status)
                    if more is None:
                        break
                    await controller.add_work(more)
                    await asyncio.sleep(0 if more or report.results else 0.01)
        finally:
            if side is not None:
                side.cancel()
            await controller.stop()

    async def until(self, condition: Callable[[], Any]) -> None:
        while not (self.status and condition()):
            await asyncio.sleep(0.002)


def card_of_run(output: Path) -> dict[str, Any]:
    return json.loads((output / "card.json").read_text())


def test_searches_stream_versions_are_used_by_later_ones_and_the_end_is_a_flow(tmp_path):
    run = Run(tmp_path / "run").go()
    flow = Flow.load(run.output)
    card = card_of_run(run.output)
    assert (flow.info.version, card["version"], card["steps"]) == (4, 4, 48)
    assert card["repeatable_from_seed"].startswith("no") and card["settings"]["live"]
    assert [line["step"] for line in read_losses(run.output / LOSSES_FILE)] == list(range(1, 49))
    assert all(isinstance(outcome, SearchResult) for outcome in run.outcomes.values())
    used = Counter(outcome.flow for outcome in run.outcomes.values())
    assert used.pop(None) >= 6 and len(used) >= 2
    methods = [{facts["method"] for facts in found} for found in card["rounds"]]
    assert methods[0] == {"residual_ts"} and "s_adt" in set().union(*methods) and len(methods) == 4
    received = sum(facts["trajectories"] for found in card["rounds"] for facts in found)
    assert (
        CONFIG.step_ratio * run.learner()["received"] >= 48
        and received == run.learner()["received"]
    )
    assert run.buffer()["repeated"] == 0 and run.status["done"] < 150, (
        "none begin while the buffer is full"
    )
    assert (
        "calibration/tree_rms_error" in card["metrics"]
        or "calibration/tree_rms_error" in card["curves"]
    )
    assert run.learner()["error"] is None and run.learner()["unusable"] == 0


def test_a_learner_that_is_killed_goes_on_from_its_saved_state_and_searches_go_on_meanwhile(
    tmp_path,
):
    """Each further learner is made to start only when three more searches have ended."""
    run = Run(tmp_path / "run", fleet=FLEET.model_copy(update={"buffer_records": 1000}))
    make = run.backend._make
    seen = []

    def made(kind: str, name: str) -> Any:
        target = make(kind, name)
        if kind == "learner" and seen:
            wanted = len(run.outcomes) + 3
            target.probe = partial(run.until, lambda: len(run.outcomes) >= wanted)
        return target

    async def kill(run: Run) -> None:
        for step in (16, 34):
            await run.until(
                lambda step=step: (run.live_learner() or NOBODY).status()["step"] >= step
            )
            dead = run.live_learner()
            run.backend.alive["learner-0"].die()
            seen.append([dead.status()["step"]])
            await run.until(lambda dead=dead: run.live_learner() not in (dead, None))
            await run.until(lambda: (run.live_learner() or NOBODY).status()["step"] > 0)
            seen[-1].append(run.live_learner().status()["step"])

    run.backend._make = made  # type: ignore[method-assign]
    run.go(kill)
    assert len(seen) == 2 and run.backend.spawned.count("learner-0") == 3
    assert all(again >= at - CONFIG.save_every for at, again in seen), seen
    assert [line["step"] for line in read_losses(run.output / LOSSES_FILE)] == list(range(1, 49))
    assert card_of_run(run.output)["version"] == 4
    assert run.status["failed"] == 0 and run.status["restarted_searches"] == 0
    facts = [facts for found in card_of_run(run.output)["rounds"] for facts in found]
    assert sum(f["searches"] for f in facts) <= run.buffer()["received"], "none is counted twice"


def test_a_training_that_was_stopped_goes_on_from_its_directory(tmp_path):
    run = Run(tmp_path / "run").go(
        stop_when=lambda learner: learner.status()["step"] >= 2 * CONFIG.save_every
    )
    before = read_losses(run.output / LOSSES_FILE)[-1]["step"]
    assert 0 < before < 48
    assert check_live(CONFIG, run.output, FLEET, resume=True) > 0
    with pytest.raises(ResultsError, match="add --resume"):
        check_live(CONFIG, run.output, FLEET, resume=False)
    again = Run(tmp_path / "run").go()
    assert card_of_run(again.output)["steps"] == 48


def test_a_buffer_that_dies_loses_what_it_held_and_nothing_else(tmp_path):
    run = Run(tmp_path / "run")

    async def kill(run: Run) -> None:
        for step in (5, 20):
            await run.until(lambda step=step: run.learner().get("step", 0) >= step)
            run.backend.alive["trajectory-buffer-0"].die()

    run.go(kill)
    assert run.backend.spawned.count("trajectory-buffer-0") == 3
    assert card_of_run(run.output)["steps"] == 48 and run.status["failed"] == 0
    assert [o for o in run.outcomes.values() if not isinstance(o, SearchResult)] == []


def test_lost_messages_and_dying_searchers_and_servers_count_nothing_twice(tmp_path):
    run = Run(tmp_path / "run", loss=0.15, seed=3)

    async def kill(run: Run) -> None:
        for step, victim in ((8, "searcher-0"), (18, "model-server-0"), (30, "searcher-0")):
            await run.until(lambda step=step: run.learner().get("step", 0) >= step)
            if victim in run.backend.alive:
                run.backend.alive[victim].die()

    run.go(kill)
    assert card_of_run(run.output)["version"] == 4
    assert run.buffer()["received"] <= run.status["total"]
    facts = [facts for found in card_of_run(run.output)["rounds"] for facts in found]
    assert sum(f["searches"] for f in facts) <= run.buffer()["received"]


def test_a_training_that_diverges_ends_the_run_and_says_why(tmp_path):
    with pytest.raises(FleetError, match=r"the learner cannot go on: .*loss nan"):
        Run(
            tmp_path / "run",
            CONFIG.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 1e30}),
        ).go()


def test_a_search_on_its_own_gives_the_trajectories_that_the_learner_gets():
    """The record that travels, with rows asked for at the other end, is what `collect` makes in one process."""
    model = _load()
    process = TokenProcess(model, model.law, 4)
    prompt = (1, 2, 3, 4, 0)
    problem = SearchProblem(0, process.root(prompt), FamilyMember(prompt))
    for method in ("residual_ts", "snis"):
        options = {"inverse_temperature": 3.0, "num_rollouts": 20}
        want = collect(process, [problem], method, options, seed=1, num_children=3)
        ((_, result),) = run_searches(process, [problem], method=method, options=options, seed=1)
        assert isinstance(result, SearchResult)
        have = FinishedSearch.of(result, problem.root, 0).trajectories(process, 3, 1)
        assert len(have) == len(want.trajectories) > 4
        for one, other in zip(have, want.trajectories, strict=True):
            assert (
                one.key == other.key and one.reward == other.reward and one.source == other.source
            )
            assert np.array_equal(one.candidates.tokens, other.candidates.tokens)
            assert np.array_equal(one.candidates.log_weight, other.candidates.log_weight)


def _record(number: int) -> SearchRecord:
    return SearchRecord(f"search/{number}", FinishedSearch((0,), {}, None, [], 0.0, None), None)


def test_a_full_buffer_lets_the_oldest_go_and_counts_them_and_a_repeated_message_counts_once():
    async def run() -> None:
        buffer = TrajectoryBuffer("trajectory-buffer-0", 4)
        for number in (0, 1, 1, 2):
            await buffer.put(_record(number))
        first = await buffer.take("", [], [], 2, 0.0)
        assert names(first) == {2: "search/1", 3: "search/2"}, "the newest first"
        for number in range(3, 8):  # 0 and 3 are lost; 1 and 2 went too, but were taken
            await buffer.put(_record(number))
        assert buffer.status() == {
            "held": 4,
            "waiting": 4,
            "received": 8,
            "repeated": 1,
            "dropped": 2,
        }
        await buffer.put(_record(2))
        again = await buffer.take(first.token, [2, 3], [2, 3], 3, 0.0)
        assert (
            names(again) == {6: "search/5", 7: "search/6", 8: "search/7"}
            and buffer.status()["repeated"] == 2
        )
        repeated = await buffer.take(first.token, [], [], 3, 0.0)
        assert names(repeated) == names(again), (
            "what is not kept elsewhere is there for the next learner"
        )
        rest = await buffer.take(first.token, [6, 7, 8], [6, 7], 3, 0.0)
        assert names(rest) == {5: "search/4"} and buffer.status()["held"] == 2
        empty = await buffer.take(first.token, [5, 8], [5, 8], 3, 0.01)
        assert empty.records == {} and buffer.status()["held"] == 0
        other = await buffer.take("another", [1], [1], 9, 0.0)
        assert other.records == {} and other.token == first.token
        late = asyncio.create_task(buffer.take(first.token, [], [], 3, 5.0))
        await asyncio.sleep(0)
        await buffer.put(_record(9))
        assert names(await late) == {9: "search/9"}

    def names(taken: Taken) -> dict[int, str]:
        return {number: record.name for number, record in taken.records.items()}

    asyncio.run(run())


def test_a_learner_that_can_use_nothing_says_so_instead_of_waiting_for_ever():
    learner = LiveLearner("learner-0", LearningPlan(CONFIG, Path(), ""))
    error = ConfigurationError("too long")
    for found in [*[error] * 15, None, *[error] * 15]:
        learner.count_unusable(_record(0), found)
    with pytest.raises(
        FleetError, match="16 searches in a row cannot be learnt from, the last because: too long"
    ):
        learner.count_unusable(_record(0), error)
    assert learner.status()["unusable"] == 31


def test_what_is_older_than_the_bound_is_not_learnt_from(tmp_path):
    config = CONFIG.model_copy(update={"max_staleness": 0, "flow_share": 1.0})
    run = Run(tmp_path / "run", config).go()
    assert run.learner()["stale"] > 0 and card_of_run(run.output)["steps"] == 48
    facts = [facts for found in card_of_run(run.output)["rounds"] for facts in found]
    assert any(f["new"] < f["trajectories"] for f in facts)
