"""A model behind an HTTP server as a LogitsModel: deadlines, and repeats that cost nothing.

See docs/architecture/fleet.md.

Standard library and safetensors only. It must not import torch, aiohttp or Ray.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.numpy import load, save

from sdt_dist.errors import ConfigurationError, FleetError, SdtError
from sdt_dist.models.card import ModelCard
from sdt_dist.models.remote.http_api import (
    ANSWER,
    CLIENT_ID,
    DEADLINE,
    IDENTITY,
    MODEL,
    RELEASE,
    REQUEST_ID,
    check_token,
    check_url,
    error_from_json,
)
from sdt_dist.models.remote.http_token import client_token
from sdt_dist.models.remote.wire import (
    WIRE_VERSION,
    compact_calls,
    pack_requests,
    unpack_replies,
)
from sdt_dist.protocols import (
    ExpandRequest,
    Expansion,
    Flow,
    ModelReply,
    ModelRequest,
    PriorLaw,
    Rollout,
    RolloutRequest,
    Root,
)

_CONNECT_S = 10.0
_LONGEST_PAUSE_S = 5.0
_RELEASE_S = 10.0


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    retry_after_s: float
    body: bytes


class HttpModel:
    """The model of `sdt serve` at `url` (http://127.0.0.1:PORT, or https://HOST:PORT).

    token: default the environment's SDT_HTTP_TOKEN. timeout_s: how long a call may take, queueing included. attempts:
    how often a lost connection is made anew; a repeated message is neither computed nor counted twice. `nfe` and
    `model_calls` count what calls of this object cost. ConfigurationError: a wrong address, token, version or model;
    FleetError: the server cannot be reached, is full for timeout_s, or does not answer within it.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 600.0,
        attempts: int = 5,
        pause_s: float = 0.25,
    ) -> None:
        self.url = url
        self._connections = _Connections(url)
        self._token = client_token() if token is None else check_token(token, "token")
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._pause_s = pause_s
        self._name = uuid.uuid4().hex
        self._sent = 0
        self._lock = threading.Lock()
        described = self._describe()
        self.card = ModelCard.from_json(json.dumps(described["card"]))
        self._max_rows = int(described["limits"]["max_rows"])
        self._max_body_bytes = int(described["limits"]["max_body_bytes"])
        self.vocab_size = self.card.vocab_size
        self.max_context = self.card.max_context
        self.deterministic = self.card.deterministic
        self.nfe = self.model_calls = self.recomputed_tokens = 0

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> list[Expansion]:
        return cast("list[Expansion]", self._ask(requests, law))

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]:
        return cast("list[Rollout]", self._ask(requests, law))

    def release(self, root: Root) -> None:
        """Tell the server that a problem is over. It forgets problems by itself too, so a lost message is no error."""
        body = json.dumps({"digests": [root.digest.hex()]}).encode()
        with contextlib.suppress(FleetError):
            self._send("POST", RELEASE, body, {}, min(self._timeout_s, _RELEASE_S))

    def load_flow(self, flow: Flow) -> None:
        """Make sure that the server holds a flow; errors as in `check_flow`."""
        self.check_flow(flow.identity)

    def check_flow(self, identity: str) -> None:
        """ConfigurationError unless the server holds this flow; a client cannot give it one."""
        held = self._describe().get("flows", [])
        if identity not in held:
            raise ConfigurationError(
                f"flow: {identity} is not held by the server at {self.url}, which has {', '.join(held) or 'none'}; start it "
                "with `sdt serve --flow PATH`."
            )

    def close(self) -> None:
        """Close idle connections; the object can still be used."""
        self._connections.close()

    def _ask(self, requests: Sequence[ModelRequest], law: PriorLaw) -> list[ModelReply]:
        """Replies in order; messages stay within the server's limits of rows and bytes."""
        if not requests:
            return []
        rows = min(len(requests), self._max_rows)
        body = save(pack_requests(requests[:rows], law)) if rows == len(requests) else b""
        if rows == len(requests) and (len(body) <= self._max_body_bytes or rows == 1):
            return self._exchange(body, requests)
        middle = min(self._max_rows, max(len(requests) // 2, 1)) if rows == len(requests) else rows
        return [*self._ask(requests[:middle], law), *self._ask(requests[middle:], law)]

    def _exchange(self, body: bytes, requests: Sequence[ModelRequest]) -> list[ModelReply]:
        with self._lock:
            self._sent += 1
            name = f"{self._name}/{self._sent}"
        headers = {REQUEST_ID: name, IDENTITY: self.card.identity}
        answer = self._send("POST", ANSWER, body, headers, self._timeout_s)
        try:
            arrays, num_calls = compact_calls(load(answer))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise FleetError(f"{self.url}: its answer cannot be read ({error}).") from error
        with self._lock:
            replies = unpack_replies(arrays, self.model_calls)
            if [reply.kind for reply in replies] != [request.kind for request in requests]:
                raise FleetError(
                    f"{self.url}: its replies do not fit the requests; is it another version of sdt?"
                )
            self.model_calls += num_calls
            self.nfe += sum(reply.cost.nfe for reply in replies)
            self.recomputed_tokens += sum(reply.cost.recomputed_tokens for reply in replies)
        return replies

    def _describe(self) -> dict[str, Any]:
        body = self._send("GET", MODEL, b"", {}, min(self._timeout_s, 60.0))
        try:
            described = json.loads(body)
            version = described["version"]
            _ = described["card"]
            _ = described["limits"]["max_rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise FleetError(
                f"{self.url} answers, but not as `sdt serve` does; check the address."
            ) from error
        if version != WIRE_VERSION:
            raise ConfigurationError(
                f"model: {self.url} speaks version {version}, this sdt {WIRE_VERSION}; install one release on both."
            )
        return described

    def _send(
        self, method: str, path: str, body: bytes, headers: dict[str, str], timeout_s: float
    ) -> bytes:
        """The body of a successful answer; lost connections and a full server are tried again until the deadline."""
        deadline = time.monotonic() + timeout_s
        losses = 0
        common = {"Authorization": f"Bearer {self._token}", CLIENT_ID: self._name, **headers}
        while True:
            left_s = max(deadline - time.monotonic(), 0.001)
            try:
                answer = self._connections.exchange(
                    method, path, body, {**common, DEADLINE: f"{left_s:.3f}"}, left_s
                )
            except _LateError as error:
                raise FleetError(f"{self.url}: no answer within {timeout_s:.3g} s.") from error
            except (OSError, http.client.HTTPException) as error:
                losses += 1
                pause_s = min(self._pause_s * 2 ** (losses - 1), _LONGEST_PAUSE_S)
                if losses >= self._attempts or time.monotonic() + pause_s > deadline:
                    raise _unreachable(self.url, error) from error
                time.sleep(pause_s)
                continue
            if answer.status == 200:
                return answer.body
            error = error_from_json(answer.status, answer.body, self.url)
            if answer.status != 503 or time.monotonic() + answer.retry_after_s > deadline:
                raise error
            time.sleep(answer.retry_after_s)


class _LateError(Exception):
    """A connection was there, but its answer did not come in time."""


class _Connections:
    """Idle connections to one server; each is used by one thread at a time."""

    def __init__(self, url: str) -> None:
        scheme, host, port = check_url(url)
        self._make: Callable[[], http.client.HTTPConnection]
        if scheme == "https":
            context = ssl.create_default_context()  # SSL_CERT_FILE names further authorities
            self._make = lambda: http.client.HTTPSConnection(
                host, port, timeout=_CONNECT_S, context=context
            )
        else:
            self._make = lambda: http.client.HTTPConnection(host, port, timeout=_CONNECT_S)
        self._idle: list[http.client.HTTPConnection] = []
        self._finalizer = weakref.finalize(self, _close_all, self._idle)

    def exchange(
        self, method: str, path: str, body: bytes, headers: dict[str, str], timeout_s: float
    ) -> _Answer:
        """One request and its answer. OSError or HTTPException for a lost connection, _LateError after timeout_s."""
        connection = self._take()
        try:
            if connection.sock is None:
                connection.connect()
            cast(socket.socket, connection.sock).settimeout(timeout_s)
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                answer = _Answer(
                    response.status, _seconds(response.getheader("Retry-After")), response.read()
                )
            except TimeoutError as error:
                raise _LateError from error
        except BaseException:
            connection.close()
            self.close()  # whatever broke this connection has broken its idle companions too
            raise
        if connection.sock is not None:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        _close_all(self._idle)

    def _take(self) -> http.client.HTTPConnection:
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()


def _close_all(connections: list[http.client.HTTPConnection]) -> None:
    while connections:
        with contextlib.suppress(IndexError):
            connections.pop().close()


def _seconds(header: str | None) -> float:
    """A Retry-After of whole seconds; else 1."""
    return float(header) if header and header.isdigit() else 1.0


def _unreachable(url: str, error: Exception) -> SdtError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"model: the certificate of {url} is not trusted ({error.verify_message}); set SSL_CERT_FILE to its own."
        )
    return FleetError(
        f"model: {url} cannot be reached ({type(error).__name__}: {error}); is `sdt serve` running, and the tunnel?"
    )
