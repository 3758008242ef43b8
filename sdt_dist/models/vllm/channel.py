"""Reduced rows on their way from vLLM's engine process: one frame an engine step, over a local socket of ours.

Only this user can open the socket (mode 0600 in a directory of mode 0700). The engine sends a frame before vLLM hears of
the step's tokens, so whoever got a finished request and then drains the socket has all of its rows. Each end sees the
other's death as the end of the stream. It must not know vLLM, searches or models.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from sdt_dist.errors import FleetError

WHOLE = -1
_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """R reduced rows of one engine step.

    requests, positions [R]: whose row, and how many tokens that request had generated before. sizes [R]: how many of
    `tokens` and `log_prob` are the row's, or WHOLE for one that is in `logits` [number of those, V] as it is.
    log_residual, num_remaining [R] as in `reduction.largest`. step [1]: the number of the forward pass.
    """

    step: np.ndarray
    requests: np.ndarray
    positions: np.ndarray
    sizes: np.ndarray
    tokens: np.ndarray
    log_prob: np.ndarray
    log_residual: np.ndarray
    num_remaining: np.ndarray
    logits: np.ndarray

    def packed(self) -> bytes:
        """The frame as it travels: its length and a safetensors file."""
        body = save({name: getattr(self, name) for name in self.__slots__})
        return _LENGTH.pack(len(body)) + body


class Listener:
    """Our end: a socket that one engine connects to, its workers' idle connections included."""

    def __init__(self, on_frame: Callable[[Frame], None]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sdt-vllm-"))
        self.path = self._folder / "rows"
        self._on_frame = on_frame
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(self.path))
        os.chmod(self.path, 0o600)
        self._server.listen()
        self._peers: dict[socket.socket, bytearray] = {}

    @property
    def peers(self) -> list[socket.socket]:
        """The connections, to wait for frames at."""
        return list(self._peers)

    def accept(self, count: int, timeout_s: float) -> None:
        """The connections of an engine's `count` workers; FleetError when they do not come in time."""
        self._server.settimeout(timeout_s)
        try:
            for _ in range(count):
                peer, _ = self._server.accept()
                peer.setblocking(False)
                self._peers[peer] = bytearray()
        except TimeoutError as error:
            raise FleetError(
                f"vllm: its engine opened no channel within {timeout_s:g} s."
            ) from error

    def drain(self) -> bool:
        """Hand on every frame that has arrived; False once an engine's process has ended."""
        still_open = [self._drain(peer, buffer) for peer, buffer in self._peers.items()]
        return all(still_open)

    def _drain(self, peer: socket.socket, buffer: bytearray) -> bool:
        open_ = True
        while open_:
            try:
                received = peer.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError:
                received = b""
            open_ = bool(received)
            buffer += received
        while len(buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
            if len(buffer) < end:
                break
            self._on_frame(Frame(**load(bytes(buffer[_LENGTH.size : end]))))
            del buffer[:end]
        return open_

    def close(self) -> None:
        """Close all connections, which ends the engine's processes, and remove the socket."""
        for peer in [*self._peers, self._server]:
            peer.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def connect(path: str) -> socket.socket:
    """The engine's end of the channel."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.connect(path)
    return channel
