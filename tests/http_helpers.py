"""A real model server in a thread of this process, on a free loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Sequence
from types import TracebackType

from sdt_dist.models.card import ModelCard
from sdt_dist.models.remote.http_client import HttpModel
from sdt_dist.protocols import LogitsModel, PriorLaw
from sdt_dist.serving.http import ModelService, ServerLimits, serve

TOKEN = "a-token-of-the-tests-0123456789"


def tokens_card(model: LogitsModel, law: PriorLaw, identity: str = "0" * 32) -> ModelCard:
    """A card for a backend without a name of its own."""
    spec = {"allowed": list(law.allowed), "end_tokens": list(law.end_tokens)}
    return ModelCard(
        "tokens", "test", identity, model.vocab_size, model.max_context, model.deterministic, spec
    )


class RunningServer:
    """Serves until `close`; `client()` makes a client that closes with it."""

    def __init__(
        self,
        model: LogitsModel,
        card: ModelCard,
        *,
        limits: ServerLimits | None = None,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        flows: Sequence[str] = (),
    ) -> None:
        self.service = ModelService(model, card, TOKEN, limits, flows)
        self._started = threading.Event()
        self._clients = list[HttpModel]()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(port, tls)), daemon=True
        )
        self._thread.start()
        assert self._started.wait(20)
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"

    async def _main(self, port: int, tls: ssl.SSLContext | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()

        def ready(bound_port: int) -> None:
            self.port = bound_port
            self._started.set()

        await serve(self.service, "127.0.0.1", port, tls=tls, stop=self._stop, ready=ready)

    def client(self, **options: object) -> HttpModel:
        self._clients.append(HttpModel(self.url, TOKEN, pause_s=0.02, **options))  # type: ignore[arg-type]
        return self._clients[-1]

    def stop(self) -> None:
        """Begin to stop; `close` waits for the end."""
        with contextlib.suppress(RuntimeError):  # its loop is closed already
            self._loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
