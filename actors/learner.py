"""The learner of a fleet without Ray: takes what searches found, trains the flow, has its versions ready.

See docs/concepts/flow.md.

Around `sdt_dist.training.flow.learner.Learner`, whose directory is all that outlives it. It works in a thread of its own, so that probes
are answered meanwhile; rows of p come from the fleet's model servers, by the calls that searchers make. It must not know
Ray or who searches.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdt_dist.actors.calls import Directory, RemoteModel, Routes, ServerCalls
from sdt_dist.actors.endpoint import GoneError
from sdt_dist.actors.searcher import SearcherSettings
from sdt_dist.actors.trajectory_buffer import SearchRecord, Taken
from sdt_dist.errors import FleetError, SdtError
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.card import process_of
from sdt_dist.models.process import ModelProcess
from sdt_dist.protocols import (
    ExpandRequest,
    Expansion,
    ModelRequest,
    PriorLaw,
    Rollout,
    RolloutRequest,
)
from sdt_dist.training.flow.config import TrainFlowConfig
from sdt_dist.training.flow.rounds import round_of

if TYPE_CHECKING:
    from sdt_dist.training.flow.learner import Learner

_LOG = logging.getLogger(__name__)
_RECORDS = 4  # taken at once
_WAIT_S = 1.0
_TAKE_TIMEOUT_S = 30.0
_MOST_FAILURES = 16  # records in a row that could not be used


@dataclass(frozen=True, slots=True)
class LearningPlan:
    """What is learnt, into which directory of the learner's machine; `data` says for the card what it is learnt from."""

    config: TrainFlowConfig
    output: Path
    data: str


class _Stopped(Exception):
    """This process is to work no more."""


class FleetModel(RemoteModel):
    """A fleet's model for a thread that may wait: `ask(requests, released)` brings the replies."""

    ask: Callable[[Sequence[ModelRequest], tuple[bytes, ...]], list[Any]]
    nfe = 0
    model_calls = 0

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> list[Expansion]:
        return self.ask(requests, self.take_released())

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]:
        return self.ask(requests, self.take_released())


class LiveLearner:
    """Trains from the first routes on, to the last step of the plan; then its directory is a flow with its card.

    Steps begin when a round's worth of searches has come, and are at most `step_ratio` a finished sample that came. What it does
    not need it leaves in the buffer. Where a directory holds a training, it goes on with it: the numbers of the records that
    are in it are saved with it, so that what came later is taken again.
    """

    def __init__(
        self, name: str, plan: LearningPlan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.plan = plan
        self._clock = clock
        self._directory = Directory(clock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._files: FlowFiles | None = None
        self._failures = 0
        self._opened_at = (0, 0.0)
        self._status: dict[str, Any] = {
            "step": 0, "version": 0, "loss": 0.0, "log_z": 0.0, "staleness": 0.0, "steps_per_s": 0.0, "replay": 0,
            "received": 0, "stale": 0, "unusable": 0, "wait_s": 0.0, "metrics": {}, "finished": False, "error": None,
        }  # fmt: skip

    async def configure(self, settings: SearcherSettings, routes: Routes) -> None:
        """The model (the first call decides, and training begins), and who can be called now."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            # a daemon, as a process that is told to end would wait for another one for ever
            self._thread = threading.Thread(
                target=self._run, args=(settings,), name=self.name, daemon=True
            )
            self._thread.start()
        await self._directory.update(routes)

    async def flow_files(self) -> FlowFiles | None:
        """The newest published version, which is on disk; None before the first."""
        return self._files

    def status(self) -> dict[str, Any]:
        """Steps, the version that is ready, the last losses, counts of what came; `error`: why it cannot go on."""
        return dict(self._status)

    def stop(self) -> None:
        """Work no more, and save nothing: what a kill is to its process. Waits for a step under way."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, settings: SearcherSettings) -> None:
        try:
            self._train(settings)
        except _Stopped:
            pass
        except SdtError as error:
            self._status["error"] = str(error)
        except Exception as error:  # noqa: BLE001 (the supervisor is told, the log has its traceback)
            _LOG.error("the learner failed", exc_info=error)
            self._status["error"] = f"{type(error).__name__}: {error}"

    def _train(self, settings: SearcherSettings) -> None:
        """From wherever the directory's training is to its end."""
        import torch

        from sdt_dist.training.flow.train import finish, open_learner
        from sdt_dist.training.flow.versions import latest_version

        config = self.plan.config
        torch.set_num_threads(config.threads)
        learner = open_learner(config, settings.card, self.plan.output, resume=True)
        try:
            found = latest_version(self.plan.output)
            if found is not None:
                self._show(*found)
            self._opened_at = (learner.step, self._clock())
            worker = _Intake(self, learner, settings)
            while learner.step < config.steps:
                if learner.step // config.steps_per_round > learner.version:
                    worker.close_round()
                    self._show(*learner.publish())
                due = (
                    min(worker.steps_allowed, config.steps_per_round * (learner.version + 1))
                    - learner.step
                )
                if due > 0 and len(learner.replay):
                    learner.train(due, on_step=lambda *_: self._note(learner))
                else:
                    worker.take()
                self._note(learner)
            if learner.version < config.rounds:
                worker.close_round()
                self._show(*learner.publish())
            finish(learner, config, self.plan.data)
            self._note(learner)
            self._status["finished"] = True
        finally:
            learner.close()

    def _show(self, number: int, path: Path) -> None:
        """Let a version that is on disk be fetched."""
        self._files = FlowFiles.read(path)
        self._status["version"] = number

    def _note(self, learner: Learner) -> None:
        """What status says, at least once a step."""
        if self._stopped.is_set():
            raise _Stopped
        step, moment = self._opened_at
        intake = learner.progress.intake
        self._status |= {
            "step": learner.step,
            "loss": learner.metrics.get("loss/total", 0.0),
            "log_z": learner.metrics.get("log_z", 0.0),
            "staleness": learner.staleness[0],
            "steps_per_s": (learner.step - step) / max(self._clock() - moment, 1e-9),
            "replay": len(learner.replay),
            "received": 0 if intake is None else intake.received,
            "stale": learner.dropped + learner.expired,
            "metrics": learner.metrics,
        }

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What a coroutine of the event loop returns, for the thread."""
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        begin = self._clock()
        try:
            while True:
                if self._stopped.is_set():
                    future.cancel()
                    raise _Stopped
                try:
                    return future.result(timeout=0.1)
                except TimeoutError:
                    if future.done():
                        return future.result()
                except concurrent.futures.CancelledError as error:
                    raise _Stopped from error  # the event loop ends
        finally:
            self._status["wait_s"] += self._clock() - begin

    def count_unusable(self, record: SearchRecord, error: SdtError | None) -> None:
        """Note whether a record could be used; FleetError when many in a row could not."""
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        self._status["unusable"] += 1
        _LOG.warning("%s cannot be learnt from: %s", record.name, error)
        if self._failures >= _MOST_FAILURES:
            raise FleetError(
                f"{self._failures} searches in a row cannot be learnt from, the last because: {error}"
            )

    async def ask_buffer(self, token: str, held: list[int], kept: list[int]) -> Taken | None:
        """What the buffer has, or None while there is none that can be called."""
        try:
            buffer = await self._directory.buffer(self._clock() + _WAIT_S)
        except FleetError:
            return None
        try:
            return await buffer.call(
                "take", token, held, kept, _RECORDS, _WAIT_S, timeout_s=_TAKE_TIMEOUT_S
            )
        except GoneError:
            self._directory.suspect(buffer)
        except FleetError:
            await asyncio.sleep(0.05)  # a lost message: taking again is harmless
        return None

    def process_of(self, settings: SearcherSettings) -> ModelProcess:
        """The fleet's model as searches see it."""
        model = FleetModel(settings.card)
        process = process_of(settings.card, model, settings.max_new_tokens, **settings.law_options)
        caller = f"{self.name}/{secrets.token_hex(8)}"
        calls = ServerCalls(
            caller, 0, self._directory, process.law, settings.call_timeout_s, self._clock
        )
        model.ask = lambda requests, released: self.wait(calls.call(requests, released))[0]
        return process


class _Intake:
    """What comes from the buffer: into the learner's replay, and into its progress for the record."""

    def __init__(self, owner: LiveLearner, learner: Learner, settings: SearcherSettings) -> None:
        from sdt_dist.training.flow.progress import Intake

        self._owner = owner
        self._learner = learner
        self._config = owner.plan.config
        self._process = owner.process_of(settings)
        self._intake = learner.progress.intake or Intake()
        learner.progress.intake = self._intake

    @property
    def steps_allowed(self) -> int:
        """The step that may be reached with what has come so far."""
        if self._intake.searches < self._config.contexts_per_round:
            return 0
        return int(self._config.step_ratio * self._intake.received)

    def take(self) -> None:
        """Take some records in, waiting a moment for the first."""
        intake = self._intake
        owner = self._owner
        kept = self._kept()
        taken = owner.wait(owner.ask_buffer(intake.token, intake.held, kept))
        if taken is None:
            return
        left: list[int] = []
        if taken.token == intake.token:
            left = [number for number in intake.held if number not in kept]
        intake.token = taken.token
        intake.held = left
        for number, record in taken.records.items():
            error = None
            try:
                self._add(record)
            except SdtError as failure:
                error = failure
            left.append(number)
            owner.count_unusable(record, error)

    def _kept(self) -> list[int]:
        """Numbers of the buffer's records that are saved, and which it need not have any more."""
        saved = self._learner.saved_progress.intake
        if saved is None or saved.token != self._intake.token:
            return []
        return saved.held

    def close_round(self) -> None:
        """The round under way is over: its sums become part of the record."""
        tally = self._intake.tally
        brought = [sums.brought(method) for method, sums in tally.items()]
        self._learner.progress.rounds.append(brought)
        self._intake.tally = {}

    def _add(self, record: SearchRecord) -> None:
        """One search's trajectories, with rows of p that model servers compute."""
        from sdt_dist.training.flow.progress import Tally
        from sdt_dist.training.flow.train import is_ordered

        config = self._config
        process = self._process
        search = record.search
        found = search.trajectories(
            process, config.num_children, config.seed, ordered=is_ordered(process)
        )
        if found:
            process.release(search.root)
        new = self._learner.add(found, record.version)
        intake = self._intake
        intake.received += len(found)
        intake.searches += 1
        next_round = round_of(config, search.source["problem"]) + 1
        intake.next_round = max(intake.next_round, next_round)
        sums = intake.tally.setdefault(search.source["method"], Tally())
        sums.trajectories += len(found)
        sums.searches += 1
        sums.new += new
        sums.reward += search.reward
        if search.ess is not None:
            sums.ess += search.ess
            sums.with_ess += 1
