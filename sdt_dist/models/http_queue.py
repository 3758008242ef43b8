"""The HTTP server's queue: one model on one thread, and what waits under one law is answered together (SPEC section 4).

Each client's problems are kept apart, so that no client changes what another one's search costs. It must not know HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from sdt_dist.errors import FleetError, SdtError
from sdt_dist.models.wire import ModelReply, ModelRequest
from sdt_dist.protocols import ExpandRequest, LogitsModel, PriorLaw, RolloutRequest, Root

_LOG = logging.getLogger(__name__)


class BusyError(FleetError):
    """The queue is full; try again in a moment."""


class LateError(FleetError):
    """The caller's time was over before the model was free."""


@dataclass(frozen=True, slots=True)
class Call:
    """One client's requests, and how long it waits for them."""

    client: str
    requests: Sequence[ModelRequest]
    law: PriorLaw
    timeout_s: float


@dataclass(frozen=True, slots=True)
class _Problem:
    """A client's root, and the root under which the model caches it."""

    client: str
    digest: bytes
    root: Root


@dataclass(eq=False, slots=True)
class _Waiting:
    call: Call
    since: float
    replies: asyncio.Future[list[ModelReply]] = field(default_factory=asyncio.Future)

    def fail(self, error: SdtError) -> None:
        if not self.replies.done():
            self.replies.set_exception(error)


class ModelQueue:
    """Answers calls of many clients; its methods run on one event loop, the model on a thread beside it.

    max_rows bounds the requests of one model call, queue_rows those that wait, max_problems those whose caches are kept
    for clients that never release them (the least recently used go first, and are computed, and counted, again).
    """

    def __init__(
        self,
        model: LogitsModel,
        *,
        max_rows: int = 4096,
        queue_rows: int = 65_536,
        max_problems: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._clock = model, clock
        self._max_rows, self._queue_rows, self._max_problems = max_rows, queue_rows, max_problems
        self._queue: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sdt-model")
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self._problems: OrderedDict[bytes, _Problem] = OrderedDict()  # of the model's thread only

    async def answer(self, call: Call) -> list[ModelReply]:
        """Replies in order. BusyError, LateError, the model's own SdtError, or FleetError for any other failure."""
        if self._closed:
            raise _stopping()
        rows = sum(len(waiting.call.requests) for waiting in self._queue)
        if self._queue and rows + len(call.requests) > self._queue_rows:
            raise BusyError(f"server: {rows} requests wait, allowed {self._queue_rows}; try again in a moment.")
        waiting = _Waiting(call, self._clock())
        self._queue.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._serve())
        return await waiting.replies

    async def release(self, client: str, digests: Sequence[bytes]) -> None:
        """Forget problems of a client, after the calls that the model works on now."""
        if not self._closed:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._release, client, digests)

    def close(self) -> None:
        """Refuse whatever waits; the model ends what it works on."""
        self._closed = True
        for waiting in self._queue:
            waiting.fail(_stopping())
        self._queue.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _serve(self) -> None:
        while self._queue:
            if batch := self._next_batch():
                await self._run(batch)

    def _next_batch(self) -> list[_Waiting]:
        """The first call and, up to max_rows, those that share its law; calls whose time is over are told so."""
        late = [waiting for waiting in self._queue if self._clock() - waiting.since > waiting.call.timeout_s]
        for waiting in late:
            seconds = f"{waiting.call.timeout_s:.3g} s"
            waiting.fail(LateError(f"server: the model was not free within {seconds}; the call was not begun."))
        batch, rows = [], 0
        for waiting in self._queue:
            rows += len(waiting.call.requests)
            if waiting not in late and (
                not batch or (waiting.call.law == batch[0].call.law and rows <= self._max_rows)
            ):
                batch.append(waiting)
            else:
                rows -= len(waiting.call.requests)
        self._queue = [waiting for waiting in self._queue if waiting not in late and waiting not in batch]
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        calls = [waiting.call for waiting in batch]
        try:
            replies = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, calls)
        except Exception as error:  # noqa: BLE001 (a model may raise anything; the call that is to blame gets it)
            await self._blame(batch, error)
            return
        rest = iter(replies)
        for waiting in batch:
            own = [next(rest) for _ in waiting.call.requests]
            if not waiting.replies.done():
                waiting.replies.set_result(own)

    async def _blame(self, batch: list[_Waiting], error: Exception) -> None:
        """Run the calls of a failed batch one by one, so that a bad request fails no other client's call."""
        if len(batch) > 1:
            for waiting in batch:
                await self._run([waiting])
        elif isinstance(error, SdtError):
            batch[0].fail(error)
        else:
            _LOG.error("the model failed", exc_info=error)
            batch[0].fail(FleetError(f"server: {type(error).__name__}: {error}"))

    def _compute(self, calls: Sequence[Call]) -> list[ModelReply]:
        """One expand and one rollout for everything that is asked, in the order it was asked."""
        requests = [request for call in calls for request in self._own(call)]
        expands = [request for request in requests if isinstance(request, ExpandRequest)]
        rollouts = [request for request in requests if isinstance(request, RolloutRequest)]
        self._bound_problems(len({request.root.digest for request in requests}))
        expansions = iter(self._model.expand(expands, calls[0].law) if expands else ())
        finished = iter(self._model.rollout(rollouts, calls[0].law) if rollouts else ())
        return [next(expansions) if isinstance(r, ExpandRequest) else next(finished) for r in requests]

    def _own(self, call: Call) -> list[ModelRequest]:
        """A call's requests with its client's problems under digests of their own, marked as used now."""
        owned: dict[int, Root] = {}
        for root in {id(request.root): request.root for request in call.requests}.values():
            name = repr((call.client, root.digest, root.prompt)).encode()
            digest = hashlib.blake2b(name, digest_size=16).digest()
            problem = self._problems.setdefault(digest, _Problem(call.client, root.digest, Root(root.prompt, digest)))
            self._problems.move_to_end(digest)
            owned[id(root)] = problem.root
        return [replace(request, root=owned[id(request.root)]) for request in call.requests]

    def _bound_problems(self, in_use: int) -> None:
        while len(self._problems) > max(self._max_problems, in_use):
            self._model.release(self._problems.popitem(last=False)[1].root)

    def _release(self, client: str, digests: Sequence[bytes]) -> None:
        gone = {
            own for own, problem in self._problems.items() if problem.client == client and problem.digest in digests
        }
        for digest in gone:
            self._model.release(self._problems.pop(digest).root)


def _stopping() -> BusyError:
    return BusyError("server: it is being stopped.")
