"""A model whose own process has ended: whoever serves it ends too, so that somebody starts another one."""

from __future__ import annotations

import asyncio

import pytest

from sdt_dist.errors import ModelGoneError
from sdt_dist.models.card import card_of
from sdt_dist.models.remote.calls import ModelCall
from sdt_dist.models.remote.wire import pack_requests
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import RolloutRequest, Root
from sdt_dist.serving.http import ModelService, serve
from sdt_dist.serving.server import ModelServer
from tests.fleet_helpers import LAW, TOY
from tests.http_helpers import TOKEN


class Gone(Toy):
    """A toy whose process ends in its first rollout, as a vLLM engine's may."""

    def __init__(self) -> None:
        super().__init__(*TOY)
        self.batches: list[int] = []

    def rollout(self, requests, law):
        self.batches.append(len(requests))
        raise ModelGoneError("its process has ended")


def _call(number: int) -> ModelCall:
    return ModelCall(
        f"call {number}",
        pack_requests([RolloutRequest(Root((1,), b"1" * 16), (), 2, number)], LAW),
        20.0,
    )


def test_every_call_of_its_batch_fails_at_once_and_the_server_is_told():
    async def run():
        told: list[ModelGoneError] = []
        model = Gone()
        server = ModelServer(model, on_gone=told.append)
        outcomes = await asyncio.gather(
            *(server.answer(_call(i)) for i in range(3)), return_exceptions=True
        )
        return model, told, outcomes

    model, told, outcomes = asyncio.run(run())
    assert all(isinstance(outcome, ModelGoneError) for outcome in outcomes)
    assert model.batches == [3], "it is not tried again call by call"
    assert len(told) == 1


def test_the_http_server_ends_and_says_why():
    async def run() -> None:
        model = Gone()
        ready = asyncio.Event()
        service = ModelService(model, card_of(model), TOKEN)
        server = asyncio.create_task(
            serve(service, "127.0.0.1", 0, stop=asyncio.Event(), ready=lambda port: ready.set())
        )
        await ready.wait()
        with pytest.raises(ModelGoneError, match="ended"):
            await service.server.answer(_call(0))
        async with asyncio.timeout(20):
            with pytest.raises(ModelGoneError, match="ended"):
                await server

    asyncio.run(run())
