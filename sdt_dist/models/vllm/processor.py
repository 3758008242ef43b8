"""Inside vLLM's engine process: rows of logits are reduced where they are computed.

See docs/architecture/search.md.

vLLM loads `RowReducer` by its class path. It chooses each row's token with our own law and noise, makes vLLM's greedy
sampler take it, and sends what search needs to know of the row. vLLM names no requests to logits processors, so a
request carries its number in `SamplingParams.extra_args`; a row's position is the length of its list of output tokens,
whose entries may be placeholders under asynchronous scheduling. A row of an unfinished prefill is sent like any other: the
same position comes again later and replaces it.
"""

# pyright: reportMissingImports=false
# (vLLM has an environment of its own, see CONTRIBUTING.md)

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Sequence
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
DRAW = -1  # instead of a number of children: choose one token and go on with it
_Reduced = tuple[np.ndarray, np.ndarray, float, int]
_NOTHING: _Reduced = (np.empty(0, np.int32), np.empty(0), -np.inf, 0)  # of a row that is sent whole
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
            number,
            children,
            key,
            tuple(excluded),
            PriorLaw(tuple(allowed), tuple(ends), temperature, top_k, top_p),
        )


@dataclass(frozen=True, slots=True)
class _Row:
    asked: Instructions
    generated: list[int]  # vLLM's own list, which grows


class RowReducer(LogitsProcessor):
    """Reduces, chooses and reports the rows of our requests; others pass untouched."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        self._batch: _Batch | None = None
        self._step = 0
        self._channel = connect(vllm_config.additional_config[CHANNEL])  # type: ignore[index]
        self._reports = get_tensor_model_parallel_rank() == 0
        threading.Thread(target=_end_with, args=(self._channel,), daemon=True).start()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if process_dict_updates(self._rows, batch_update, _new_row):
            self._batch = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Make every row of ours choose its token; logits [rows of the batch, V] float32, changed in place."""
        if not self._rows:
            return logits
        batch = self._batch = self._batch or _Batch(self._rows, logits.device)
        values = (
            (logits if len(batch.places) == len(logits) else logits[batch.places]).cpu().numpy()
        )
        frame, chosen = batch.reduce(self._step, values)
        if self._reports:
            self._channel.sendall(frame.packed())
        self._step += 1
        logits[batch.places, torch.from_numpy(chosen).to(logits.device)] = _CHOSEN
        return logits


class _Batch:
    """Rows that are reduced together, step after step, until vLLM changes its batch."""

    def __init__(self, rows: dict[int, _Row], device: torch.device) -> None:
        places = sorted(rows)
        self.places = torch.tensor(places, device=device)
        self._rows = [rows[place] for place in places]
        self._numbers = np.array([row.asked.number for row in self._rows], dtype=np.int64)
        self._whole = np.array([row.asked.children is None for row in self._rows])
        laws = dict.fromkeys(row.asked.law for row in self._rows)
        self._laws = {
            law: [i for i, row in enumerate(self._rows) if row.asked.law == law] for law in laws
        }
        self._is_uniform = len(laws) == 1 and all(row.asked.children == DRAW for row in self._rows)

    def reduce(self, step: int, values: np.ndarray) -> tuple[Frame, np.ndarray]:
        """The frame of a step with logits `values` [R, V], and the tokens [R] int64 that vLLM must take."""
        positions = np.array([len(row.generated) for row in self._rows], dtype=np.int32)
        if self._is_uniform:
            tokens, log_prob, residual, count = self._drawn(
                range(len(self._rows)), positions, self._scores(values)
            )
            sizes = np.ones(len(tokens), dtype=np.int32)
            first = tokens.astype(np.int64)
        else:
            found = self._mixed(positions, values)
            sizes = np.where(self._whole, WHOLE, [len(row[0]) for row in found]).astype(np.int32)
            tokens, log_prob = (np.concatenate([row[i] for row in found]) for i in (0, 1))
            residual, count = (np.array([row[i] for row in found]) for i in (2, 3))
            first = np.array([row[0][0] if len(row[0]) else 0 for row in found], dtype=np.int64)
        return (
            Frame(
                step=np.array([step]),
                requests=self._numbers,
                positions=positions,
                sizes=sizes,
                tokens=tokens.astype(np.int32),
                log_prob=log_prob,
                log_residual=residual,
                num_remaining=count.astype(np.int32),
                logits=values[self._whole],
            ),
            first,
        )

    def _scores(self, values: np.ndarray) -> np.ndarray:
        return law_scores(values, next(iter(self._laws)))

    def _drawn(
        self, places: Sequence[int], positions: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One token for each of these rows, as `draw` gives them."""
        asked = [self._rows[i].asked for i in places]
        at = [int(positions[i]) for i in places]
        keys = [
            None if a.key is None else position_key(a.key, step)
            for a, step in zip(asked, at, strict=True)
        ]
        return draw(
            scores, keys, [() if step else a.excluded for a, step in zip(asked, at, strict=True)]
        )

    def _mixed(self, positions: np.ndarray, values: np.ndarray) -> list[_Reduced]:
        """Tokens, log p, residual and count of rows that differ in law or in what is wanted of them."""
        found: list[_Reduced] = [_NOTHING] * len(self._rows)
        for law, places in self._laws.items():
            drawn = [i for i in places if self._rows[i].asked.children == DRAW]
            kept = [i for i in places if self._rows[i].asked.children not in (DRAW, None)]
            if drawn:
                columns = self._drawn(drawn, positions, law_scores(values[drawn], law))
                for i, token, log_prob, residual, count in zip(drawn, *columns, strict=True):
                    found[i] = np.array([token]), np.array([log_prob]), residual, count
            if kept:
                asked = [self._rows[i].asked for i in kept]
                counts, keys, excluded = zip(
                    *((a.children, a.key, a.excluded) for a in asked), strict=True
                )
                for i, row in zip(
                    kept,
                    largest(law_scores(values[kept], law), counts, keys, excluded),
                    strict=True,
                ):
                    found[i] = row
        return found


def _new_row(
    params: SamplingParams, _prompt: list[int] | None, generated: list[int]
) -> _Row | None:
    values = (params.extra_args or {}).get(REQUEST)
    return None if values is None else _Row(Instructions.of(values), generated)


def _end_with(channel: socket.socket) -> None:
    """End the engine's processes when the one that asks has ended, so that its device is free for the next engine.

    This process is the engine's core, or a worker whose parent the core is.
    """
    owner = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    parent = os.getppid()
    with contextlib.suppress(OSError):  # reset, where frames were left unread
        while channel.recv(1):
            pass
    if parent not in (owner, 1) and os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
