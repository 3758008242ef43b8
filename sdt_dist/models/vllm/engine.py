"""vLLM's asynchronous engine behind plain calls: it runs on an event loop of its own, its core in another process.

A request's rows come over our channel (`channel`, `processor`); vLLM's own output says when it is finished, how much of
its prompt was cached, and which tokens it generated, which must be those of the rows. It must not know searches.
"""

# pyright: reportMissingImports=false
# (vLLM has an environment of its own, see CONTRIBUTING.md)

from __future__ import annotations

import asyncio
import atexit
import itertools
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import embeds_input, tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from sdt_dist.errors import FleetError, ModelGoneError
from sdt_dist.models.vllm.channel import WHOLE, Frame, Listener
from sdt_dist.models.vllm.processor import CHANNEL, Instructions

_CONNECT_S = 60.0
_REDUCER = "sdt_dist.models.vllm.processor:RowReducer"


@dataclass(frozen=True, slots=True)
class Ask:
    """Generate up to `num_tokens` tokens after a prompt, or one whose row is reduced; see `Instructions`.

    embeddings [n, hidden] float32 stand for the prompt's first n tokens. fresh: read nothing from the prefix cache.
    """

    prompt: list[int]
    num_tokens: int
    instructions: Instructions
    embeddings: np.ndarray | None = None
    fresh: bool = False


class Columns:
    """A frame's columns as lists, which many requests look at."""

    __slots__ = ("frame", "log_prob", "log_residual", "num_remaining", "step", "tokens")

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.step = int(frame.step[0])
        self.tokens = frame.tokens.tolist()
        self.log_prob = frame.log_prob.tolist()
        self.log_residual = frame.log_residual.tolist()
        self.num_remaining = frame.num_remaining.tolist()


@dataclass(slots=True)
class Answer:
    """A request's rows: where they are, by position: a frame's columns, the row in it, the first and end of its tokens.

    num_cached: how many prompt tokens were cached.
    """

    rows: dict[int, tuple[Columns, int, int, int]] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)  # numbers of the forward passes it took part in
    num_cached: int = 0
    logits: np.ndarray | None = None  # [V], of a row that is sent whole

    def drawn(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, log p, log residuals and counts [n] of the tokens that a rollout drew."""
        rows = [self.rows[position] for position in range(len(self.rows))]
        return (
            np.array([columns.tokens[begin] for columns, _, begin, _ in rows], dtype=np.int32),
            np.array([columns.log_prob[begin] for columns, _, begin, _ in rows]),
            np.array([columns.log_residual[i] for columns, i, _, _ in rows]),
            np.array([columns.num_remaining[i] for columns, i, _, _ in rows], dtype=np.int32),
        )

    def kept(self) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Tokens [K], log p [K], log residual and count of the one row of an expansion."""
        columns, i, begin, end = self.rows[0]
        frame = columns.frame
        return (
            frame.tokens[begin:end],
            frame.log_prob[begin:end],
            columns.log_residual[i],
            columns.num_remaining[i],
        )


class Engine:
    """One vLLM engine. Calls may come from several threads; their requests share its steps.

    `steps` is the number of forward passes so far. Errors: ModelGoneError once the engine's process has ended,
    FleetError when vLLM does not do what this relies on.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.steps = 0
        self._numbers = itertools.count()
        self._under_way: dict[int, Answer] = {}
        self._listener = Listener(self._take)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._llm: AsyncLLM | None = None
        atexit.register(self.close)
        try:
            self._llm = self.wait(self._start(settings))
        except BaseException:
            self.close()
            raise

    @property
    def llm(self) -> AsyncLLM:
        """vLLM's own object; its tasks are those of this engine's loop."""
        assert self._llm is not None
        return self._llm

    def number(self) -> int:
        """A new request's number."""
        return next(self._numbers)

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """The answers to requests that run together, in order."""
        try:
            return self.wait(self._run(asks))
        except CancelledError as error:
            raise ModelGoneError("vllm: the engine was closed; load the model again.") from error

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of everything that is not under way."""
        self.wait(self.llm.reset_prefix_cache())

    def close(self) -> None:
        """End the engine's process; whoever waits gets a ModelGoneError."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self.wait(self._shut_down())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._listener.close()

    async def _shut_down(self) -> None:
        """On the loop, so that vLLM's own task of reading outputs is cancelled before it can miss its engine."""
        for peer in self._listener.peers:
            self._loop.remove_reader(peer)
        if self._llm is not None:
            self._llm.shutdown()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something on the engine's loop, from another thread; its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, settings: dict[str, Any]) -> AsyncLLM:
        arguments = AsyncEngineArgs(
            **settings,
            logits_processors=[_REDUCER],
            additional_config={CHANNEL: self._listener.path.as_posix()},
        )
        with _main_module_hidden():
            llm = AsyncLLM.from_engine_args(arguments, stat_loggers=_stat_loggers())
        workers = llm.vllm_config.parallel_config.world_size
        self._listener.accept(workers, _CONNECT_S)
        for peer in self._listener.peers:
            self._loop.add_reader(peer, self._drain)
        return llm

    async def _run(self, asks: Sequence[Ask]) -> list[Answer]:
        tasks = [asyncio.ensure_future(self._answer(ask)) for ask in asks]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, ask: Ask) -> Answer:
        number = ask.instructions.number
        answer = self._under_way[number] = Answer()
        try:
            output = await self._generate(ask)
        except EngineDeadError as error:
            raise ModelGoneError(
                "vllm: the engine's process has ended; load the model again."
            ) from error
        finally:
            self._drain()
            del self._under_way[number]
        answer.num_cached = output.num_cached_tokens or 0
        _check(answer, list(output.outputs[0].token_ids))
        return answer

    async def _generate(self, ask: Ask) -> RequestOutput:
        number = ask.instructions.number
        parameters = SamplingParams(
            max_tokens=ask.num_tokens,
            temperature=0.0,
            stop_token_ids=list(ask.instructions.law.end_tokens),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=ask.instructions.packed(),
        )
        salt = str(number) if ask.fresh else None
        prompt = _prompt(ask, salt)
        outputs = [
            output async for output in self.llm.generate(prompt, parameters, request_id=str(number))
        ]
        if not outputs:
            raise FleetError("vllm: a request ended without output.")
        return outputs[-1]

    def _drain(self) -> None:
        if not self._listener.drain():
            for peer in self._listener.peers:
                self._loop.remove_reader(peer)

    def _take(self, frame: Frame) -> None:
        """Note a frame's rows; of two for one position the later one counts (`processor`)."""
        columns = Columns(frame)
        under_way = self._under_way
        self.steps = columns.step + 1
        begin = whole = 0
        for i, (number, position, size) in enumerate(
            zip(
                frame.requests.tolist(), frame.positions.tolist(), frame.sizes.tolist(), strict=True
            )
        ):
            end = begin + max(size, 0)
            answer = under_way.get(number)
            if answer is not None:
                answer.rows[position] = columns, i, begin, end
                answer.steps.add(columns.step)
                if size == WHOLE:
                    answer.logits = frame.logits[whole]
            begin = end
            whole = whole + (size == WHOLE)


def _prompt(ask: Ask, salt: str | None) -> Any:
    if ask.embeddings is None:
        return tokens_input(ask.prompt, cache_salt=salt)
    import torch

    length = len(ask.prompt)
    known = len(ask.embeddings)
    padded = np.zeros((length, ask.embeddings.shape[1]), dtype=np.float32)
    padded[:known] = ask.embeddings
    return embeds_input(
        torch.from_numpy(padded),
        cache_salt=salt,
        prompt_token_ids=ask.prompt,
        is_token_ids=[place >= known for place in range(length)],
    )


def _check(answer: Answer, generated: list[int]) -> None:
    """FleetError unless the rows that arrived are those of the tokens that vLLM generated.

    Under asynchronous scheduling a step may already be under way when an end token is seen: its row is dropped.
    """
    rows = answer.rows = {
        position: row for position, row in answer.rows.items() if position < len(generated)
    }
    tokens = {position: row[0].tokens[row[2]] for position, row in rows.items() if row[2] < row[3]}
    if len(rows) < len(generated) or any(
        generated[position] != token for position, token in tokens.items()
    ):
        raise FleetError(
            f"vllm: rows for positions {sorted(rows)} do not belong to its {len(generated)} generated tokens; this "
            "version of vLLM does not call logits processors as 0.32 does."
        )


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keep a spawned process from importing the caller's script once more, which needs no guard for it then.

    It also breaks vLLM's CPU build, which stumbles over some modules that are there before its own (0.32).
    """
    main = sys.modules["__main__"]
    kept = {
        name: main.__dict__.pop(name) for name in ("__spec__", "__file__") if name in main.__dict__
    }
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(kept)


def _stat_loggers() -> list[Any]:
    """Inside Ray, vLLM's own exporter of its metrics to Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return []
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    return [RayPrometheusStatLogger]
