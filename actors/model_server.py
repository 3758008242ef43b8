"""A model server without Ray: batches the calls of many searchers for one model (SPEC section 4).

Calls wait in a bounded queue; whenever the model is free, everything that waits and shares a definition of p goes
into one expand and one rollout. A call is named by its caller: repeating a name gives the first answer again, so a
lost reply is never computed or billed twice. It must not know searches, problems or rewards.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from sdt_dist.errors import FleetError, SdtError
from sdt_dist.models.wire import pack_replies, pack_requests, unpack_requests
from sdt_dist.protocols import ExpandRequest, Expansion, LogitsModel, PriorLaw, Rollout, RolloutRequest, Root
from sdt_dist.search.driver import answer

_REMEMBERED_CALLS = 256
Arrays = dict[str, Any]


class BusyError(FleetError):
    """The queue is full; try again in a moment."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """Packed requests of one caller. `name` is unique; `timeout_s` is how long it may wait for its turn."""

    name: str
    packed: Arrays
    rows: int
    timeout_s: float
    released: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """Packed replies, this call's share by rows of the seconds its batch took, and the rows that wait behind it."""

    packed: Arrays
    seconds: float
    waiting_rows: int


@dataclass(slots=True)
class ServerCounters:
    """What a server did since it started. `distributions` are next-token distributions asked for, `nfe` computed."""

    calls: int = 0
    batches: int = 0
    rows: int = 0
    tokens: int = 0
    distributions: int = 0
    nfe: int = 0
    model_calls: int = 0
    recomputed_tokens: int = 0
    busy_s: float = 0.0
    waiting_calls: int = 0
    waiting_rows: int = 0
    largest_batch_rows: int = 0


@dataclass(eq=False)
class _Waiting:
    call: ModelCall
    requests: list[ExpandRequest | RolloutRequest]
    law: PriorLaw
    since: float
    answer: asyncio.Future[ModelAnswer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ModelServer:
    """Serves one `LogitsModel`; all methods run on one event loop, the model on one thread beside it.

    queue_rows bounds the rows that wait. Raises BusyError when they are more, FleetError for a call whose turn did not
    come in time, and whatever SdtError the model raises for a call's own requests.
    """

    def __init__(
        self,
        model: LogitsModel,
        *,
        name: str = "model server",
        queue_rows: int = 65_536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.name, self.counters = model, name, ServerCounters()
        self._queue_rows, self._clock = queue_rows, clock
        self._queue: list[_Waiting] = []
        self._known: OrderedDict[str, asyncio.Future[ModelAnswer]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, call: ModelCall) -> ModelAnswer:
        """The replies to a call; the same name gives the same answer."""
        if call.name not in self._known:
            self._known[call.name] = self._enqueue(call).answer
            while len(self._known) > _REMEMBERED_CALLS and next(iter(self._known.values())).done():
                self._known.popitem(last=False)
        future = self._known[call.name]
        try:
            return await asyncio.shield(future)
        except BusyError:
            self._known.pop(call.name, None)
            raise

    async def probe(self) -> None:
        """Generate one token; a server that cannot is not ready."""
        law, root = PriorLaw((0, self.model.vocab_size)), Root((0,), b"sdt server probe")
        packed = pack_requests([RolloutRequest(root, (), 1, key=0)], law)
        name = f"probe {self._clock()}"
        await self.answer(ModelCall(name, packed, 1, timeout_s=3600.0, released=(root.digest,)))

    def status(self) -> dict[str, Any]:
        """Counters as plain numbers."""
        return asdict(self.counters)

    def _enqueue(self, call: ModelCall) -> _Waiting:
        requests, law = unpack_requests(call.packed)
        waiting = _Waiting(call, requests, law, self._clock())
        if self._queue and self.counters.waiting_rows + call.rows > self._queue_rows:
            waiting.answer.set_exception(
                BusyError(f"{self.name}: {self.counters.waiting_rows} rows wait, allowed {self._queue_rows}.")
            )
            return waiting
        self._queue.append(waiting)
        self._count_queue()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._serve())
        return waiting

    def _count_queue(self) -> None:
        self.counters.waiting_calls = len(self._queue)
        self.counters.waiting_rows = sum(waiting.call.rows for waiting in self._queue)

    async def _serve(self) -> None:
        while self._queue:
            batch = self._next_batch()
            if batch:
                await self._run(batch)

    def _next_batch(self) -> list[_Waiting]:
        """Everything that waits under the first call's law; calls whose time is over are answered with an error."""
        law, now = self._queue[0].law, self._clock()
        batch = [waiting for waiting in self._queue if waiting.law == law]
        self._queue = [waiting for waiting in self._queue if waiting.law != law]
        self._count_queue()
        late = [w for w in batch if now - w.since > w.call.timeout_s]
        for waiting in late:
            waiting.answer.set_exception(
                FleetError(
                    f"{self.name}: a call of {waiting.call.rows} rows waited {now - waiting.since:.0f} s for its turn."
                )
            )
        return [waiting for waiting in batch if waiting not in late]

    async def _run(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        begin, rows = self._clock(), sum(waiting.call.rows for waiting in batch)
        try:
            released = [digest for waiting in batch for digest in waiting.call.released]
            replies = await loop.run_in_executor(
                self._thread, self._compute, [r for w in batch for r in w.requests], batch[0].law, released
            )
            rest = iter(replies)
            packed = [pack_replies([next(rest) for _ in waiting.requests]) for waiting in batch]
        except Exception as error:  # noqa: BLE001 (a model may raise anything; the call that is to blame gets it)
            await self._blame(batch, error)
            return
        seconds = self._clock() - begin
        self._count_batch(batch, rows, replies, seconds)
        for waiting, own in zip(batch, packed, strict=True):
            share = seconds * waiting.call.rows / max(rows, 1)
            waiting.answer.set_result(ModelAnswer(own, share, self.counters.waiting_rows))

    async def _blame(self, batch: list[_Waiting], error: Exception) -> None:
        """Run the calls of a failed batch one by one, so that a bad request fails no other call."""
        if len(batch) > 1:
            for waiting in batch:
                await self._run([waiting])
            return
        known = error if isinstance(error, SdtError) else FleetError(f"{self.name}: {type(error).__name__}: {error}")
        batch[0].answer.set_exception(known)
        batch[0].answer.exception()  # seen, even if the caller is gone

    def _compute(
        self, requests: Sequence[ExpandRequest | RolloutRequest], law: PriorLaw, released: Sequence[bytes]
    ) -> list[Expansion | Rollout]:
        for digest in released:
            self.model.release(Root((), digest))
        model = self.model
        try:
            return answer(lambda r: model.expand(r, law), lambda r: model.rollout(r, law), requests)  # type: ignore[return-value]
        except StopIteration as error:  # which no future can hold
            raise FleetError(f"{self.name}: the model gave fewer replies than it was asked for.") from error

    def _count_batch(
        self, batch: list[_Waiting], rows: int, replies: list[Expansion | Rollout], seconds: float
    ) -> None:
        counters = self.counters
        counters.calls += len(batch)
        counters.batches += 1
        counters.rows += rows
        counters.largest_batch_rows = max(counters.largest_batch_rows, rows)
        counters.busy_s += seconds
        tokens = sum(len(reply.tokens) for reply in replies if isinstance(reply, Rollout))
        counters.tokens += tokens
        counters.distributions += tokens + sum(isinstance(reply, Expansion) for reply in replies)
        counters.nfe, counters.model_calls = self.model.nfe, self.model.model_calls
        counters.recomputed_tokens = getattr(self.model, "recomputed_tokens", 0)
