"""The actor around a `ModelServer`."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import ray

from sdt_dist.actors.metrics import Exporter
from sdt_dist.actors.work import Loader
from sdt_dist.errors import ModelGoneError
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.card import ModelCard, card_of
from sdt_dist.models.remote.calls import ModelAnswer, ModelCall
from sdt_dist.serving.server import ModelServer

_LOG = logging.getLogger(__name__)


@ray.remote(concurrency_groups={"control": 4})
class ModelServerActor:
    """One copy of a model; see `ModelServer`."""

    def __init__(self, name: str, loader: Loader, queue_rows: int, threads: int | None) -> None:
        loaded = loader()
        self._threads = threads
        self._limit_threads()
        self._card = card_of(loaded)
        self._server = ModelServer(
            getattr(loaded, "model", loaded), name=name, queue_rows=queue_rows, on_gone=_exit
        )
        self._exporter = Exporter("model_server", name)

    async def answer(self, call: ModelCall) -> ModelAnswer:
        return await self._server.answer(call)

    async def load_flow(self, files: FlowFiles) -> None:
        await self._server.load_flow(files)
        self._limit_threads()

    async def drop_flow(self, identity: str) -> None:
        await self._server.drop_flow(identity)

    async def probe(self) -> None:
        """One token for real."""
        await self._server.probe()

    @ray.method(concurrency_group="control")
    async def card(self) -> ModelCard:
        return self._card

    @ray.method(concurrency_group="control")
    async def status(self) -> dict[str, Any]:
        status = self._server.status()
        self._exporter.export(status)
        return status

    def _limit_threads(self) -> None:
        """Once torch is loaded, with the model or with the first flow, it takes no more cores than the server has."""
        if self._threads is not None and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._threads)

    def __repr__(self) -> str:
        return self._server.name if hasattr(self, "_server") else "model-server (loading)"


def _exit(error: ModelGoneError) -> None:
    """End this actor, whose model has ended; the controller starts another one."""
    _LOG.error("%s", error)
    os._exit(1)
