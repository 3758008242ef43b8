"""A model server over HTTP, for machines outside a Ray cluster such as a Mac (SPEC section 4).

Bearer token, flat arrays in safetensors (no pickle), bounded bodies, rows and queue. One event loop, one model thread.
It must not know Ray or searches.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import math
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from aiohttp import web
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sdt_dist.errors import ConfigurationError, FleetError, SdtError
from sdt_dist.models.card import ModelCard
from sdt_dist.models.http_api import (
    ANSWER,
    CLIENT_ID,
    DEADLINE,
    HEALTH,
    IDENTITY,
    MODEL,
    RELEASE,
    REQUEST_ID,
    error_json,
    is_loopback,
)
from sdt_dist.models.http_queue import BusyError, Call, LateError, ModelQueue
from sdt_dist.models.process import check_law
from sdt_dist.models.wire import WIRE_VERSION, check_tokens, num_rows, pack_replies, unpack_requests
from sdt_dist.protocols import LogitsModel, RolloutRequest

_LOG = logging.getLogger(__name__)
_MOST_ANSWERS, _MOST_ANSWER_BYTES, _LONGEST_NAME = 256, 128 << 20, 128
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """max_body_bytes of a request, max_rows of requests in a message and in a model call, queue_rows that may wait."""

    max_body_bytes: int = 32 << 20
    max_rows: int = 4096
    queue_rows: int = 65_536


class _Refused(Exception):
    """An error with a status of its own."""

    def __init__(self, status: int, error: SdtError) -> None:
        super().__init__(str(error))
        self.status, self.error = status, error


class ModelService:
    """The handlers of one served model; `application` is what aiohttp runs."""

    def __init__(self, model: LogitsModel, card: ModelCard, token: str, limits: ServerLimits | None = None) -> None:
        self.card, self.limits = card, limits or ServerLimits()
        self._queue = ModelQueue(model, max_rows=self.limits.max_rows, queue_rows=self.limits.queue_rows)
        self._authorization = f"Bearer {token}".encode()
        self._answers: dict[str, tuple[bytes, asyncio.Task[bytes]]] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()  # bytes of the answers that are there
        self._described = json.dumps({
            "version": WIRE_VERSION,
            "card": json.loads(card.to_json()),
            "limits": {"max_rows": self.limits.max_rows, "max_body_bytes": self.limits.max_body_bytes},
        })  # fmt: skip

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._errors, self._authorize], client_max_size=self.limits.max_body_bytes)
        app.router.add_get(HEALTH, self._health)
        app.router.add_get(MODEL, self._model)
        app.router.add_post(ANSWER, self._answer)
        app.router.add_post(RELEASE, self._release)
        app.on_shutdown.append(self._close)
        return app

    @web.middleware
    async def _errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Every error as JSON."""
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            most = self.limits.max_body_bytes / 2**20
            return _failure(413, ConfigurationError(f"request: over {most:.3g} MiB; raise --max-body-mb of sdt serve."))
        except web.HTTPException as error:
            return _failure(error.status, FleetError(f"{request.method} {request.path}: {error.reason}"))
        except _Refused as refused:
            return _failure(refused.status, refused.error)
        except BusyError as error:
            return _failure(503, error, {"Retry-After": "1"})
        except LateError as error:
            return _failure(504, error)
        except SdtError as error:
            return _failure(500 if isinstance(error, FleetError) else 400, error)
        except Exception as error:  # noqa: BLE001 (the caller gets it, the log its traceback)
            _LOG.error("%s %s failed", request.method, request.path, exc_info=error)
            return _failure(500, FleetError(f"server: {type(error).__name__}: {error}"))

    @web.middleware
    async def _authorize(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path != HEALTH and not hmac.compare_digest(given, self._authorization):
            return _failure(
                401,
                ConfigurationError("token: missing or wrong; give the one that `sdt serve` uses on that machine."),
                {"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _model(self, request: web.Request) -> web.Response:
        return web.Response(text=self._described, content_type="application/json")

    async def _answer(self, request: web.Request) -> web.Response:
        """Packed replies to packed requests; a message that was sent before gets its first answer again."""
        self._check_model(request)
        name, client, body = _header(request, REQUEST_ID), _header(request, CLIENT_ID), await request.read()
        digest = hashlib.blake2b(body, digest_size=16).digest()
        if name not in self._answers:
            task = asyncio.create_task(self._compute(client, body, _timeout_s(request)))
            task.add_done_callback(lambda done: self._settle(name, done))
            self._answers[name] = (digest, task)
        known, task = self._answers[name]
        if known != digest:
            raise _Refused(409, ConfigurationError(f"{REQUEST_ID}: {name} was used for other requests; use a new one."))
        return web.Response(body=await asyncio.shield(task), content_type="application/octet-stream")

    async def _release(self, request: web.Request) -> web.Response:
        client, body = _header(request, CLIENT_ID), await request.read()
        try:
            digests = [bytes.fromhex(digest) for digest in json.loads(body)["digests"]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigurationError('release: the body must be {"digests": [hex, ...]}.') from error
        await self._queue.release(client, digests)
        return web.json_response({"released": len(digests)})

    async def _compute(self, client: str, body: bytes, timeout_s: float) -> bytes:
        """Unpack, check, answer and pack one message."""
        try:
            arrays = load(body)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ConfigurationError(f"request: the body is no safetensors ({error}).") from error
        rows = num_rows(arrays)
        if not 1 <= rows <= self.limits.max_rows:
            raise ConfigurationError(f"request: {rows} rows, allowed 1 to {self.limits.max_rows}; send several.")
        check_tokens(arrays, self.card.vocab_size)
        requests, law = unpack_requests(arrays)
        check_law(law, self.card.vocab_size)
        for asked in requests:
            least, count = (0, asked.num_tokens) if isinstance(asked, RolloutRequest) else (1, asked.num_children)
            if not least <= count <= max(self.card.max_context, self.card.vocab_size):
                raise ConfigurationError(f"request: num_tokens or num_children of {count}, allowed {least} or more.")
        packed = pack_replies(await self._queue.answer(Call(client, requests, law, timeout_s)))
        return save({name: np.ascontiguousarray(array) for name, array in packed.items()})

    def _settle(self, name: str, task: asyncio.Task[bytes]) -> None:
        """Keep recent answers only, and no failure: a repeated message may do better."""
        if task.cancelled() or task.exception() is not None:
            self._answers.pop(name, None)
            return
        self._sizes[name] = len(task.result())
        while len(self._sizes) > _MOST_ANSWERS or (
            len(self._sizes) > 1 and sum(self._sizes.values()) > _MOST_ANSWER_BYTES
        ):
            self._answers.pop(self._sizes.popitem(last=False)[0], None)

    def _check_model(self, request: web.Request) -> None:
        identity = request.headers.get(IDENTITY)
        if identity != self.card.identity:
            raise _Refused(
                409,
                ConfigurationError(
                    f"model: this server has {self.card.name!r} (identity {self.card.identity}), not {identity}; it "
                    "was restarted with another model, so this search cannot go on with it."
                ),
            )

    async def _close(self, app: web.Application) -> None:
        self._queue.close()


async def serve(
    service: ModelService,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    stop: asyncio.Event,
    ready: Callable[[int], None],
) -> None:
    """Answer until `stop` is set; `ready` is told the port (0 takes a free one). ConfigurationError: cannot bind."""
    check_bind(host, tls is not None)
    runner = web.AppRunner(service.application(), access_log=None, auto_decompress=False, shutdown_timeout=5.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
        except OSError as error:
            raise ConfigurationError(
                f"port: {port} on {host} cannot be used ({error}); give another --port."
            ) from error
        ready(runner.addresses[0][1])
        await stop.wait()
    finally:
        await runner.cleanup()


def check_bind(host: str, has_tls: bool) -> None:
    """ConfigurationError for an address that other machines reach without TLS."""
    if not has_tls and not is_loopback(host):
        raise ConfigurationError(
            f"host: {host!r} without TLS would take the token and the prompts unencrypted. Keep 127.0.0.1 and open an "
            "SSH tunnel from this machine to the one that searches (`ssh -N -R 8011:127.0.0.1:8011 USER@MACHINE`, then "
            "--model http://127.0.0.1:8011 there), or give --tls-cert and --tls-key."
        )


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The server's side of TLS, or None without files; ConfigurationError when they cannot be used."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigurationError("tls-cert and tls-key: only one was given; give both, or neither.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"tls-cert, tls-key: {certificate}, {key} cannot be used ({error}).") from error
    return context


def _header(request: web.Request, name: str) -> str:
    value = request.headers.get(name, "")
    if not 0 < len(value) <= _LONGEST_NAME or not value.isascii():
        raise ConfigurationError(
            f"{name}: the header is missing or too long; allowed: 1 to {_LONGEST_NAME} characters."
        )
    return value


def _timeout_s(request: web.Request) -> float:
    given = request.headers.get(DEADLINE, "")
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(given)) < math.inf:
            return seconds
    raise ConfigurationError(f"{DEADLINE}: {given!r}, allowed: seconds above 0.")


def _failure(status: int, error: SdtError, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(error_json(error), status=status, headers=headers)
