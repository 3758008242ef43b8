"""A model server: batches the calls of many callers for one model (docs/architecture/fleet.md).

Calls wait in a bounded queue; whenever the model is free, what waits and shares a definition of p goes into one expand
and one rollout. A model that batches by itself says how many such calls it takes at once (`concurrent_calls`). A call is named by its caller: repeating a name gives the first answer again, so a lost reply is never
computed or billed twice. It must not know Ray, HTTP, searches or rewards.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from sdt_dist.dispatch import dispatch, split
from sdt_dist.errors import FleetError, ModelGoneError, SdtError
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.remote.calls import (
    BusyError,
    LateError,
    ModelAnswer,
    ModelCall,
    NameTakenError,
)
from sdt_dist.models.remote.columns import Arrays
from sdt_dist.models.remote.wire import num_rows, pack_replies, pack_requests, unpack_requests
from sdt_dist.protocols import (
    LogitsModel,
    ModelReply,
    ModelRequest,
    PriorLaw,
    RolloutRequest,
    Root,
)
from sdt_dist.serving.hold_flow import hold_flow

_LOG = logging.getLogger(__name__)
# remembered for callers whose reply was lost
_MOST_ANSWERS = 256
_MOST_ANSWER_BYTES = 128 << 20


@dataclass(slots=True)
class ServerCounters:
    """What a server did since it started. `distributions` are next-token distributions asked for, `nfe` computed.

    recomputed, prefix and reused tokens are the model's own counts, 0 where it keeps none.
    """

    calls: int = 0
    batches: int = 0
    rows: int = 0
    tokens: int = 0
    distributions: int = 0
    nfe: int = 0
    model_calls: int = 0
    recomputed_tokens: int = 0
    prefix_tokens: int = 0
    reused_tokens: int = 0
    busy_s: float = 0.0
    waiting_calls: int = 0
    waiting_rows: int = 0
    largest_batch_rows: int = 0


@dataclass(eq=False, slots=True)
class _Waiting:
    call: ModelCall
    requests: list[ModelRequest]
    law: PriorLaw
    since: float
    answer: asyncio.Future[ModelAnswer] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class ModelServer:
    """Serves one `LogitsModel`; all methods run on one event loop, the model on threads beside it.

    max_rows bounds the rows (requests) of one model call unless a single caller asks for more, queue_rows those that
    wait, max_problems those whose caches are kept for callers that never release them (the least recently used go
    first, and are computed, and counted, again). on_gone is called once the model's own process has ended.
    """

    def __init__(
        self,
        model: LogitsModel,
        *,
        name: str = "model server",
        max_rows: int = 4096,
        queue_rows: int = 65_536,
        max_problems: int = 1024,
        on_gone: Callable[[ModelGoneError], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.name = name
        self.counters = ServerCounters()
        self._max_rows = max_rows
        self._queue_rows = queue_rows
        self._max_problems = max_problems
        self._clock = clock
        self._queue: list[_Waiting] = []
        self._known: dict[
            str, tuple[bytes, asyncio.Future[ModelAnswer]]
        ] = {}  # by name, with what was asked
        self._kept: OrderedDict[str, int] = OrderedDict()  # bytes of the answers that are there
        # digests; of the model's threads, under the lock
        self._problems: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()
        self._most_batches = getattr(model, "concurrent_calls", 1)
        self._threads = ThreadPoolExecutor(self._most_batches, thread_name_prefix="model")
        self._workers: list[asyncio.Task[None]] = []
        self._under_way = 0
        self._busy_since = 0.0
        self._on_gone = on_gone
        self._closed = False

    async def answer(self, call: ModelCall) -> ModelAnswer:
        """The replies to a call; the same name gives the same answer, while it is recent.

        BusyError, LateError, NameTakenError, the model's own SdtError, or FleetError for any other failure.
        """
        asked = _fingerprint(call.packed)
        if call.name not in self._known:
            future = self._enqueue(call)
            self._known[call.name] = asked, future
            future.add_done_callback(partial(self._settle, call.name))
        known, future = self._known[call.name]
        if known != asked:
            raise NameTakenError(
                f"{self.name}: the name {call.name} was used for other requests; use a new one."
            )
        return await asyncio.shield(future)

    async def release(self, digests: Sequence[bytes]) -> None:
        """Forget problems, after what the model works on now."""
        if not self._closed:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._release, digests)

    async def load_flow(self, files: FlowFiles) -> None:
        """Let requests have tilts by a flow, from the model's next call on; again is harmless.

        ConfigurationError where the model cannot hold flows, CheckpointError for damaged files.
        """
        if self._closed:
            raise self._stopping()
        await asyncio.get_running_loop().run_in_executor(
            self._threads, hold_flow, self.model, files
        )

    async def drop_flow(self, identity: str) -> None:
        """Forget a flow that no request will name any more; again is harmless."""
        drop = getattr(self.model, "drop_flow", None)
        if drop is not None and not self._closed:
            await asyncio.get_running_loop().run_in_executor(self._threads, drop, identity)

    async def probe(self) -> None:
        """Generate one token; a server that cannot is not ready."""
        law = PriorLaw((0, self.model.vocab_size))
        root = Root((0,), b"sdt server probe")
        packed = pack_requests([RolloutRequest(root, (), 1, key=0)], law)
        await self.answer(
            ModelCall(f"probe {self._clock()}", packed, timeout_s=3600.0, released=(root.digest,))
        )

    def status(self) -> dict[str, Any]:
        """Counters as plain numbers."""
        return asdict(self.counters)

    def close(self) -> None:
        """Refuse whatever waits; the model ends what it works on."""
        self._closed = True
        for waiting in self._queue:
            waiting.answer.set_exception(self._stopping())
        self._queue = []
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _stopping(self) -> BusyError:
        return BusyError(f"{self.name}: it is being stopped.")

    def _enqueue(self, call: ModelCall) -> asyncio.Future[ModelAnswer]:
        if self._closed:
            raise self._stopping()
        waiting_rows = self.counters.waiting_rows
        if self._queue and waiting_rows + num_rows(call.packed) > self._queue_rows:
            raise BusyError(
                f"{self.name}: {waiting_rows} rows wait, allowed {self._queue_rows}; try again in a moment."
            )
        waiting = _Waiting(call, *unpack_requests(call.packed), self._clock())
        self._queue.append(waiting)
        self._count_queue()
        self._workers = [worker for worker in self._workers if not worker.done()]
        if len(self._workers) < self._most_batches:
            self._workers.append(asyncio.create_task(self._serve()))
        return waiting.answer

    def _settle(self, name: str, answer: asyncio.Future[ModelAnswer]) -> None:
        """Keep recent answers only, and no failure: a repeated call may do better."""
        if answer.exception() is not None:
            del self._known[name]
            return
        self._kept[name] = sum(array.nbytes for array in answer.result().packed.values())
        while len(self._kept) > _MOST_ANSWERS or (
            len(self._kept) > 1 and sum(self._kept.values()) > _MOST_ANSWER_BYTES
        ):
            del self._known[self._kept.popitem(last=False)[0]]

    async def _serve(self) -> None:
        while self._queue:
            if batch := self._next_batch():
                await self._run(batch)

    def _next_batch(self) -> list[_Waiting]:
        """The first call and, up to max_rows, those that share its law; calls whose time is over are told so."""
        batch: list[_Waiting] = []
        rest: list[_Waiting] = []
        now = self._clock()
        rows = 0
        for waiting in self._queue:
            own = len(waiting.requests)
            if (waited_s := now - waiting.since) > waiting.call.timeout_s:
                message = (
                    f"a call of {own} rows waited {waited_s:.3g} s for its turn and was not begun."
                )
                waiting.answer.set_exception(LateError(f"{self.name}: {message}"))
            elif not batch or (waiting.law == batch[0].law and rows + own <= self._max_rows):
                batch.append(waiting)
                rows += own
            else:
                rest.append(waiting)
        self._queue = rest
        self._count_queue()
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        begin = self._begin()
        requests = [request for waiting in batch for request in waiting.requests]
        released = [digest for waiting in batch for digest in waiting.call.released]
        try:
            replies = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._compute, requests, batch[0].law, released
            )
            rest = iter(replies)
            packed = [pack_replies([next(rest) for _ in waiting.requests]) for waiting in batch]
        except ModelGoneError as error:
            for waiting in batch:
                waiting.answer.set_exception(error)
            self._on_gone(error)
            return
        except Exception as error:  # noqa: BLE001 (a model may raise anything; the call that is to blame gets it)
            await self._blame(batch, error)
            return
        finally:
            self._end()
        seconds = self._clock() - begin
        self._count_batch(len(batch), replies)
        for waiting, own in zip(batch, packed, strict=True):
            share = seconds * len(waiting.requests) / max(len(requests), 1)
            waiting.answer.set_result(ModelAnswer(own, share))

    def _begin(self) -> float:
        """A batch begins; the model is busy while there is one."""
        now = self._clock()
        if not self._under_way:
            self._busy_since = now
        self._under_way += 1
        return now

    def _end(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self.counters.busy_s += self._clock() - self._busy_since

    async def _blame(self, batch: list[_Waiting], error: Exception) -> None:
        """Run the calls of a failed batch one by one, so that a bad request fails no other call."""
        if len(batch) > 1:
            for waiting in batch:
                await self._run([waiting])
        elif isinstance(error, SdtError):
            batch[0].answer.set_exception(error)
        else:
            _LOG.error("%s: the model failed", self.name, exc_info=error)
            batch[0].answer.set_exception(
                FleetError(f"{self.name}: {type(error).__name__}: {error}")
            )

    def _compute(
        self, requests: Sequence[ModelRequest], law: PriorLaw, released: Sequence[bytes]
    ) -> list[ModelReply]:
        """One expand and one rollout for everything that is asked, in the order it was asked."""
        self._release(released)
        self._use_problems(list(dict.fromkeys(request.root.digest for request in requests)))
        handlers = {
            "expand": lambda asked: self.model.expand(asked, law),
            "rollout": lambda asked: self.model.rollout(asked, law),
        }
        return dispatch(requests, handlers, self.name)

    def _release(self, digests: Sequence[bytes]) -> None:
        with self._lock:
            for digest in digests:
                self._problems.pop(digest, None)
        for digest in digests:
            self.model.release(Root((), digest))

    def _use_problems(self, digests: Sequence[bytes]) -> None:
        """Mark problems as used now; the least recently used go where there are too many."""
        with self._lock:
            for digest in digests:
                self._problems[digest] = None
                self._problems.move_to_end(digest)
            too_many = len(self._problems) - max(self._max_problems, len(digests))
            oldest = list(self._problems)[: max(too_many, 0)]
        self._release(oldest)

    def _count_queue(self) -> None:
        self.counters.waiting_calls = len(self._queue)
        self.counters.waiting_rows = sum(len(waiting.requests) for waiting in self._queue)

    def _count_batch(self, calls: int, replies: Sequence[ModelReply]) -> None:
        counters = self.counters
        counters.calls += calls
        counters.batches += 1
        counters.rows += len(replies)
        counters.largest_batch_rows = max(counters.largest_batch_rows, len(replies))
        by_kind = split(replies, {"expand": "expand", "rollout": "rollout"})
        tokens = sum(len(rollout.tokens) for rollout in by_kind["rollout"])
        counters.tokens += tokens
        counters.distributions += tokens + len(by_kind["expand"])
        counters.nfe = self.model.nfe
        counters.model_calls = self.model.model_calls
        counters.recomputed_tokens = getattr(self.model, "recomputed_tokens", 0)
        counters.prefix_tokens = getattr(self.model, "prefix_tokens", 0)
        counters.reused_tokens = getattr(self.model, "reused_tokens", 0)


def _fingerprint(packed: Arrays) -> bytes:
    """A digest of what a call asks for."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(packed.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
