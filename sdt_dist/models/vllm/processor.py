"""Inside vLLM's engine process: rows of logits are reduced where they are computed (SPEC section 3).

vLLM loads `RowReducer` by its class path. It chooses each row's token with our own law and noise, makes vLLM's greedy
sampler take it, and sends what search needs to know of the row. vLLM names no requests to logits processors, so a
request carries its number in `SamplingParams.extra_args`; a row's position is the length of its list of output tokens,
whose entries may be placeholders under asynchronous scheduling. A row of an unfinished prefill is sent like any other: the
same position comes again later and replaces it.
"""

# pyright: reportMissingImports=false
# (vLLM has an environment of its own, see CONTRIBUTING.md)

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from sdt_dist.models.reduction import draw, largest, law_scores
from sdt_dist.models.vllm.channel import WHOLE, Frame, connect
from sdt_dist.noise import position_key
from sdt_dist.protocols import PriorLaw

CHANNEL = "sdt_channel"  # key of the socket's path in vLLM's additional_config
REQUEST = "sdt"  # key of a request's instructions in extra_args
DRAW = 0  # instead of a number of children: choose one token and go on with it
_CHOSEN = torch.finfo(torch.float32).max  # a logit that greedy sampling takes


@dataclass(frozen=True, slots=True)
class Instructions:
    """What becomes of a request's rows: the `children` best kept, or DRAW, or None: sent whole."""

    number: int
    children: int | None
    key: int | None
    excluded: tuple[int, ...]
    law: PriorLaw

    def packed(self) -> dict[str, Any]:
        """As it travels in extra_args."""
        law = self.law
        return {
            REQUEST: [
                self.number, self.children, self.key, list(self.excluded),
                [list(law.allowed), list(law.end_tokens), law.sampling_temperature, law.top_k, law.top_p],
            ]
        }  # fmt: skip

    @classmethod
    def of(cls, values: list[Any]) -> Instructions:
        number, children, key, excluded, (allowed, ends, temperature, top_k, top_p) = values
        return cls(
            number, children, key, tuple(excluded), PriorLaw(tuple(allowed), tuple(ends), temperature, top_k, top_p)
        )


@dataclass(frozen=True, slots=True)
class _Row:
    asked: Instructions
    generated: list[int]  # vLLM's own list, which grows

    def key(self, position: int) -> int | None:
        return None if self.asked.key is None else position_key(self.asked.key, position)


@dataclass(frozen=True, slots=True)
class _Reduced:
    """One row of a frame; tokens and log_prob are empty where the whole row is sent."""

    tokens: np.ndarray
    log_prob: np.ndarray
    log_residual: float
    num_remaining: int


class RowReducer(LogitsProcessor):
    """Reduces, chooses and reports the rows of our requests; others pass untouched."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        self._step = 0
        self._channel = connect(vllm_config.additional_config[CHANNEL])  # type: ignore[index]
        self._reports = get_tensor_model_parallel_rank() == 0
        threading.Thread(target=_end_with, args=(self._channel,), daemon=True).start()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _new_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Make every row of ours choose its token; logits [rows of the batch, V] float32, changed in place."""
        if not self._rows:
            return logits
        places = sorted(self._rows)
        rows = [self._rows[place] for place in places]
        positions = [len(row.generated) for row in rows]
        values = (logits if len(places) == len(logits) else logits[places]).cpu().numpy()
        reduced = _reduce(rows, positions, values)
        if self._reports:
            self._channel.sendall(_frame(self._step, rows, positions, reduced, values).packed())
        self._step += 1
        chosen = [int(row.tokens[0]) if len(row.tokens) else 0 for row in reduced]
        logits[torch.tensor(places), torch.tensor(chosen)] = _CHOSEN
        return logits


def _new_row(params: SamplingParams, _prompt: list[int] | None, generated: list[int]) -> _Row | None:
    values = (params.extra_args or {}).get(REQUEST)
    return None if values is None else _Row(Instructions.of(values), generated)


def _reduce(rows: list[_Row], positions: list[int], values: np.ndarray) -> list[_Reduced]:
    """The reduced rows of values [R, V], in order."""
    whole = _Reduced(np.empty(0, np.int32), np.empty(0), -np.inf, 0)
    found = [whole] * len(rows)
    for law in dict.fromkeys(row.asked.law for row in rows):
        own = [i for i, row in enumerate(rows) if row.asked.law == law and row.asked.children is not None]
        if own:
            scores = law_scores(values if len(own) == len(values) else values[own], law)
            for i, row in zip(own, _reduce_law([(rows[i], positions[i]) for i in own], scores), strict=True):
                found[i] = row
    return found


def _reduce_law(rows: list[tuple[_Row, int]], scores: np.ndarray) -> list[_Reduced]:
    """Rows that share a law, given their scores [R, V]."""
    found: dict[int, _Reduced] = {}
    drawn = [i for i, (row, _) in enumerate(rows) if row.asked.children == DRAW]
    if drawn:
        keys = [rows[i][0].key(rows[i][1]) for i in drawn]
        excluded = [() if rows[i][1] else rows[i][0].asked.excluded for i in drawn]
        columns = draw(scores if len(drawn) == len(scores) else scores[drawn], keys, excluded)
        for i, token, log_prob, residual, count in zip(drawn, *columns, strict=True):
            found[i] = _Reduced(np.array([token]), np.array([log_prob]), residual, count)
    kept = [i for i in range(len(rows)) if i not in found]
    if kept:
        asked = [rows[i][0].asked for i in kept]
        counts, excluded = [a.children or 0 for a in asked], [a.excluded for a in asked]
        columns = largest(
            scores if len(kept) == len(scores) else scores[kept], counts, [a.key for a in asked], excluded
        )
        for i, row in zip(kept, columns, strict=True):
            found[i] = _Reduced(*row)
    return [found[i] for i in range(len(rows))]


def _frame(step: int, rows: list[_Row], positions: list[int], reduced: list[_Reduced], values: np.ndarray) -> Frame:
    is_whole = [row.asked.children is None for row in rows]
    sizes = [WHOLE if whole else len(row.tokens) for whole, row in zip(is_whole, reduced, strict=True)]
    return Frame(
        step=np.array([step], dtype=np.int64),
        requests=np.array([row.asked.number for row in rows], dtype=np.int64),
        positions=np.array(positions, dtype=np.int32),
        sizes=np.array(sizes, dtype=np.int32),
        tokens=np.concatenate([row.tokens for row in reduced]).astype(np.int32),
        log_prob=np.concatenate([row.log_prob for row in reduced]),
        log_residual=np.array([row.log_residual for row in reduced]),
        num_remaining=np.array([row.num_remaining for row in reduced], dtype=np.int32),
        logits=values[is_whole],
    )


def _end_with(channel: socket.socket) -> None:
    """End the engine's processes when the one that asks has ended, so that its device is free for the next engine.

    This process is the engine's core, or a worker whose parent the core is.
    """
    owner, parent = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0], os.getppid()
    while channel.recv(1):
        pass
    if parent not in (owner, 1) and os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
