"""A model server over HTTP, for machines outside a Ray cluster such as a Mac.

See docs/architecture/fleet.md.

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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from aiohttp import web
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sdt_dist.errors import ConfigurationError, FleetError, ModelGoneError, SdtError
from sdt_dist.models.card import ModelCard
from sdt_dist.models.process import check_law
from sdt_dist.models.remote.calls import BusyError, LateError, ModelCall, NameTakenError
from sdt_dist.models.remote.columns import Arrays, pack_lists, unpack_lists
from sdt_dist.models.remote.http_api import (
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
from sdt_dist.models.remote.wire import WIRE_VERSION, check_counts, check_tokens, law_of, num_rows
from sdt_dist.protocols import LogitsModel
from sdt_dist.serving.server import ModelServer

_LOG = logging.getLogger(__name__)
_LONGEST_NAME = 128
_STATUS: dict[type[SdtError], int] = {
    NameTakenError: 409,
    BusyError: 503,
    LateError: 504,
    FleetError: 500,
    SdtError: 400,
}
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
        self.status = status
        self.error = error


class ModelService:
    """The handlers of one served model; `application` is what aiohttp runs. `flows`: identities of those that it holds."""

    def __init__(
        self,
        model: LogitsModel,
        card: ModelCard,
        token: str,
        limits: ServerLimits | None = None,
        flows: Sequence[str] = (),
    ) -> None:
        self.card = card
        self.limits = limits or ServerLimits()
        self.flows = tuple(flows)
        self.failure: ModelGoneError | None = None  # once the model's own process has ended
        self.ended = asyncio.Event()
        self.server = ModelServer(
            model,
            name="server",
            max_rows=self.limits.max_rows,
            queue_rows=self.limits.queue_rows,
            on_gone=self._on_gone,
        )
        self._authorization = f"Bearer {token}".encode()
        self._described = json.dumps({
            "version": WIRE_VERSION,
            "card": json.loads(card.to_json()),
            "limits": {"max_rows": self.limits.max_rows, "max_body_bytes": self.limits.max_body_bytes},
            "flows": self.flows,
        })  # fmt: skip

    def application(self) -> web.Application:
        app = web.Application(
            middlewares=[self._errors, self._authorize], client_max_size=self.limits.max_body_bytes
        )
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
            return _failure(
                413,
                ConfigurationError(
                    f"request: over {most:.3g} MiB; raise --max-body-mb of sdt serve."
                ),
            )
        except web.HTTPException as error:
            return _failure(
                error.status, FleetError(f"{request.method} {request.path}: {error.reason}")
            )
        except _Refused as refused:
            return _failure(refused.status, refused.error)
        except SdtError as error:
            status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
            return _failure(status, error, {"Retry-After": "1"} if status == 503 else None)
        except Exception as error:  # noqa: BLE001 (the caller gets it, the log its traceback)
            _LOG.error("%s %s failed", request.method, request.path, exc_info=error)
            return _failure(500, FleetError(f"server: {type(error).__name__}: {error}"))

    @web.middleware
    async def _authorize(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path != HEALTH and not hmac.compare_digest(given, self._authorization):
            return _failure(
                401,
                ConfigurationError(
                    "token: missing or wrong; give the one that `sdt serve` uses on that machine."
                ),
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
        name = _header(request, REQUEST_ID)
        client = _header(request, CLIENT_ID)
        timeout_s = _timeout_s(request)
        asked = self._checked(await request.read())
        answer = await self.server.answer(ModelCall(name, asked | _owned(asked, client), timeout_s))
        body = save({name: np.ascontiguousarray(array) for name, array in answer.packed.items()})
        return web.Response(body=body, content_type="application/octet-stream")

    async def _release(self, request: web.Request) -> web.Response:
        client = _header(request, CLIENT_ID)
        body = await request.read()
        try:
            digests = [bytes.fromhex(digest) for digest in json.loads(body)["digests"]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigurationError(
                'release: the body must be {"digests": [hex, ...]}.'
            ) from error
        await self.server.release([_own_digest(client, digest) for digest in digests])
        return web.json_response({"released": len(digests)})

    def _checked(self, body: bytes) -> Arrays:
        """The packed requests of a message, if the model can be asked them."""
        try:
            arrays = load(body)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ConfigurationError(f"request: the body is no safetensors ({error}).") from error
        rows = num_rows(arrays)
        if not 1 <= rows <= self.limits.max_rows:
            raise ConfigurationError(
                f"request: {rows} rows, allowed 1 to {self.limits.max_rows}; send several."
            )
        check_tokens(arrays, self.card.vocab_size)
        check_counts(arrays, max(self.card.max_context, self.card.vocab_size))
        check_law(law_of(arrays), self.card.vocab_size)
        return arrays

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

    def _on_gone(self, error: ModelGoneError) -> None:
        self.failure = error
        self.ended.set()

    async def _close(self, app: web.Application) -> None:
        self.server.close()


async def serve(
    service: ModelService,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    stop: asyncio.Event,
    ready: Callable[[int], None],
) -> None:
    """Answer until `stop` is set; `ready` is told the port (0 takes a free one).

    ConfigurationError: cannot bind. ModelGoneError: the model's own process has ended; nobody can be answered any more.
    """
    check_bind(host, tls is not None)
    runner = web.AppRunner(
        service.application(), access_log=None, auto_decompress=False, shutdown_timeout=5.0
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
        except OSError as error:
            raise ConfigurationError(
                f"port: {port} on {host} cannot be used ({error}); give another --port."
            ) from error
        ready(runner.addresses[0][1])
        waits = [asyncio.ensure_future(event.wait()) for event in (stop, service.ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    finally:
        await runner.cleanup()
    if service.failure is not None:
        raise service.failure


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
        raise ConfigurationError(
            f"tls-cert, tls-key: {certificate}, {key} cannot be used ({error})."
        ) from error
    return context


def _owned(asked: Arrays, client: str) -> Arrays:
    """A message's problems under digests of its client's own, so that no client changes what another's search costs."""
    digests = unpack_lists(asked, "digest", np.uint8)
    return pack_lists(
        "digest", [_own_digest(client, bytes(digest)) for digest in digests], np.uint8
    )


def _own_digest(client: str, digest: bytes) -> bytes:
    return hashlib.blake2b(repr((client, digest)).encode(), digest_size=16).digest()


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
