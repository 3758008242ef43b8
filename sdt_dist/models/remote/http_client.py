"""A model behind an HTTP server as a LogitsModel: deadlines, and repeats that cost nothing.

See docs/architecture/fleet.md.

urllib3 and safetensors only. It must not import torch, aiohttp or Ray.
"""

from __future__ import annotations

import contextlib
import io
import json
import ssl
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.numpy import load, save
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Retry, Timeout
from urllib3.exceptions import HTTPError, MaxRetryError, ReadTimeoutError
from urllib3.response import BaseHTTPResponse

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
_ROUNDING_S = 0.01
_IDLE = 64  # connections that are kept; more calls at a time have more
_BLOCK_BYTES = (
    1 << 18
)  # sent at a time: a body may take longer than a connection, but not each block of it


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
        self._pool = _pool_of(url)
        self._token = client_token() if token is None else check_token(token, "token")
        self._timeout_s = timeout_s
        self._retries = Retry(
            attempts - 1,
            allowed_methods=None,
            backoff_factor=pause_s,
            backoff_max=_LONGEST_PAUSE_S,
        )
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
        before = self._pool
        self._pool = _pool_of(self.url)
        before.close()

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
        retries = self._retries
        common = {"Authorization": f"Bearer {self._token}", CLIENT_ID: self._name, **headers}
        while True:
            left_s = max(deadline - time.monotonic(), 0.001)
            try:
                answer = self._request(method, path, body, common, left_s)
            except HTTPError as error:
                is_over = time.monotonic() + _ROUNDING_S > deadline
                if isinstance(error, ReadTimeoutError) and is_over:
                    raise FleetError(f"{self.url}: no answer within {timeout_s:.3g} s.") from error
                self.close()  # whatever broke this connection has broken its idle companions too
                retries = self._after_a_loss(retries, error, deadline)
                continue
            if answer.status == 200:
                return answer.data
            error = error_from_json(answer.status, answer.data, self.url)
            pause_s = _seconds(answer.headers.get("Retry-After"))
            if answer.status != 503 or time.monotonic() + pause_s > deadline:
                raise error
            time.sleep(pause_s)

    def _request(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str],
        left_s: float,
    ) -> BaseHTTPResponse:
        """One request and its answer. urllib3 repeats nothing here, as a repeat must say how much time is left."""
        sized = {**headers, DEADLINE: f"{left_s:.3f}", "Content-Length": str(len(body))}
        return self._pool.urlopen(
            method,
            path,
            io.BytesIO(body),
            sized,
            retries=False,
            redirect=False,
            timeout=Timeout(connect=min(_CONNECT_S, left_s), read=left_s),
        )

    def _after_a_loss(self, retries: Retry, error: HTTPError, deadline: float) -> Retry:
        """Wait before the next attempt; what is left of them. An SdtError where there is none, or no time for it."""
        try:
            retries = retries.increment("POST", self.url, error=error)
        except MaxRetryError:
            raise _unreachable(self.url, error) from error
        pause_s = retries.get_backoff_time()
        if time.monotonic() + pause_s > deadline:
            raise _unreachable(self.url, error) from error
        time.sleep(pause_s)
        return retries


def _pool_of(url: str) -> HTTPConnectionPool:
    """Connections to one server, without proxies; each is used by one thread at a time."""
    scheme, host, port = check_url(url)
    if scheme == "http":
        return HTTPConnectionPool(host, port, maxsize=_IDLE, blocksize=_BLOCK_BYTES)
    context = ssl.create_default_context()  # SSL_CERT_FILE names further authorities
    return HTTPSConnectionPool(
        host, port, maxsize=_IDLE, blocksize=_BLOCK_BYTES, ssl_context=context
    )


def _seconds(header: str | None) -> float:
    """A Retry-After of whole seconds; else 1."""
    return float(header) if header and header.isdigit() else 1.0


def _unreachable(url: str, error: HTTPError) -> SdtError:
    cause = _cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"model: the certificate of {url} is not trusted ({cause.verify_message}); set SSL_CERT_FILE to its own."
        )
    return FleetError(
        f"model: {url} cannot be reached ({type(cause).__name__}: {cause}); is `sdt serve` running, and the tunnel?"
    )


def _cause(error: BaseException) -> BaseException:
    """What urllib3 wrapped: an error of the socket, of TLS or of HTTP."""
    while isinstance(error, HTTPError):
        inner = next((one for one in error.args if isinstance(one, Exception)), error.__cause__)
        if inner is None:
            break
        error = inner
    return error
