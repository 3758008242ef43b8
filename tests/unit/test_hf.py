"""The hf backend against Transformers itself, and its prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from sdt_dist.models.hf.model import HFModel
from sdt_dist.models.hf.module_decoder import ModuleDecoder, _PlainAttention
from sdt_dist.models.remote.calls import ModelCall
from sdt_dist.models.remote.wire import pack_requests
from sdt_dist.protocols import ExpandRequest, RolloutRequest
from sdt_dist.serving.server import ModelServer
from tests.conformance.conftest import BACKENDS


@pytest.mark.parametrize("name", ["hf-llama", "hf-llama-gqa", "hf-module"])
def test_scores_agree_with_the_module(name):
    backend = BACKENDS[name]()
    model = backend.make()
    root = backend.root()
    (reply,) = model.rollout([RolloutRequest(root, (), 12, 3)], backend.law)
    ids = torch.tensor([[*root.prompt, *reply.tokens.tolist()]])
    with torch.inference_mode():
        log_probs = torch.log_softmax(backend.modules[0](input_ids=ids).logits[0].double(), -1)
    first = len(root.prompt) - 1
    expected = [float(log_probs[first + j, token]) for j, token in enumerate(reply.tokens.tolist())]
    np.testing.assert_allclose(reply.log_prob, expected, atol=1e-5)


def test_the_lean_decoder_agrees_with_the_module_decoder():
    backend = BACKENDS["hf-llama-gqa"]()
    lean = backend.make()
    plain = HFModel(backend.modules[0])
    plain._decoder = ModuleDecoder(backend.modules[0])
    requests = [RolloutRequest(backend.root(i), (), 15, i) for i in range(5)]
    for a, b in zip(
        lean.rollout(requests, backend.law), plain.rollout(requests, backend.law), strict=True
    ):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.log_prob, b.log_prob, atol=1e-4)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["hf-llama", "hf-llama-gqa", "hf-module"])
def test_a_rows_bits_do_not_depend_on_its_place_among_others_with_several_threads_either(
    name, threads
):
    backend = BACKENDS[name]()
    root = backend.root()
    prefix = backend.path(backend.make(), root, 6)
    requests = [ExpandRequest(root, (*prefix, token), 24) for token in backend.tokens(19)]
    replies = backend.make().expand(requests, backend.law)
    assert all(
        backend.same(have, want)
        for have, want in zip(replies, backend.alone(requests), strict=True)
    )


@pytest.mark.parametrize("mask", [None, "numbers", "booleans"])
def test_plain_attention_is_that_of_torch_and_stays_where_it_was_asked_for(mask):
    torch.manual_seed(0)
    query = torch.randn(8, 4, 1, 16)
    key = torch.randn(8, 2, 9, 16)
    value = torch.randn(8, 2, 9, 16)
    masks = {
        None: None,
        "numbers": torch.randn(8, 1, 1, 9),
        "booleans": torch.rand(8, 1, 1, 9) < 0.7,
    }

    def attend() -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, masks[mask], scale=0.3, enable_gqa=True
        )

    want = attend()
    with _PlainAttention():
        have = attend()
    torch.testing.assert_close(have, want, rtol=0.0, atol=2e-6)
    assert not torch.equal(have, want) and torch.equal(attend(), want)


def test_what_requests_need_and_what_of_it_was_cached_is_counted():
    """By hand, prompts of 6 tokens: (positions before the wanted rows, those of them that a cache held)."""
    backend = BACKENDS["hf-llama"]()
    model, tight, (root, other) = (
        backend.make(),
        backend.make(cache_bytes=1),
        (backend.root(0), backend.root(1)),
    )
    a, b, c, d, e = backend.tokens(5)

    def counted(of: HFModel, *states: tuple) -> tuple[int, int]:
        before = of.prefix_tokens, of.reused_tokens
        of.expand([ExpandRequest(*state, 2) for state in states], backend.law)
        return of.prefix_tokens - before[0], of.reused_tokens - before[1]

    assert counted(model, (root, ())) == (6, 0), "a new prompt"
    assert counted(model, (root, ())) == (6, 6), "its row is kept"
    assert counted(model, (root, (a, b, c))) == (6 + 3, 6)
    assert counted(model, (root, (a, b, c))) == (6 + 3, 6 + 2), (
        "the last token is fed for the row after it"
    )
    assert counted(model, (root, (a, b, c, d, e))) == (6 + 5, 6 + 3)
    assert counted(model, (root, (a, d, c)), (root, (b, a))) == (6 + 3 + 6 + 2, 6 + 1 + 6 + 0)
    assert counted(model, (other, (a, b, c)), (other, (a, b))) == (6 + 3 + 6 + 2, 0 + 0 + 6 + 0), (
        "no other problem's"
    )
    model.release(other)
    assert counted(model, (other, (a,))) == (6 + 1, 0)
    for _ in range(2):
        counted(tight, (root, (a, b, c)))
    assert (tight.prefix_tokens, tight.reused_tokens) == (2 * 9, 6), "its budget holds prompts only"
    before = model.prefix_tokens, model.reused_tokens
    model.rollout(
        [RolloutRequest(other, (), 8, 1), RolloutRequest(other, (a, b), 8, 1)], backend.law
    )
    assert (model.prefix_tokens - before[0], model.reused_tokens - before[1]) == (
        6 + 6 + 2,
        6 + 6 + 1,
    )


def test_a_server_reports_prefix_and_reused_tokens():
    backend = BACKENDS["hf-llama"]()

    async def main() -> dict:
        server = ModelServer(backend.make())
        for name in ("first", "second"):
            asked = pack_requests([ExpandRequest(backend.root(), (4, 5, 6), 2)], backend.law)
            await server.answer(ModelCall(name, asked, 60.0))
        server.close()
        return server.status()

    status = asyncio.run(main())
    assert (status["prefix_tokens"], status["reused_tokens"]) == (9 + 9, 0 + 8)


def test_the_cache_saves_work_and_eviction_is_counted():
    backend = BACKENDS["hf-llama"]()
    roomy = backend.make()
    tight = backend.make(cache_bytes=1)
    for model in (roomy, tight):
        for key in range(50):
            (reply,) = model.rollout([RolloutRequest(backend.root(), (), 12, key)], backend.law)
            if reply.finish_reason == "length":
                break
        prefix = tuple(reply.tokens[:10].tolist())
        model.expand([ExpandRequest(backend.root(), prefix, 2)], backend.law)
    assert roomy.recomputed_tokens == 0
    assert tight.recomputed_tokens == 9
    assert roomy.nfe == tight.nfe


def test_release_forgets_a_problem():
    backend = BACKENDS["hf-llama"]()
    model = backend.make()
    model.rollout([RolloutRequest(backend.root(i), (), 8, 1) for i in (0, 1)], backend.law)
    model.release(backend.root(0))
    before = model.nfe
    model.expand([ExpandRequest(backend.root(1), (), 1)], backend.law)
    assert model.nfe == before
    model.expand([ExpandRequest(backend.root(0), (), 1)], backend.law)
    assert model.nfe == before + 1
    model.release(backend.root(0))
    model.release(backend.root(1))
    assert model._cache.size_bytes == 0


def test_a_prompt_is_paid_once_even_when_a_second_server_encodes_it_again():
    """A search that moves to a backend without its caches pays recomputed tokens there, and no NFE for its prompt."""
    backend = BACKENDS["hf-llama"]()
    first = backend.make()
    second = backend.make()
    root = backend.root()
    (paid,) = first.rollout([RolloutRequest(root, (), 4, key=1)], backend.law)
    (again,) = second.rollout([RolloutRequest(replace(root, paid=True), (), 4, key=1)], backend.law)
    length = len(paid.tokens)
    assert again.tokens.tolist() == paid.tokens.tolist()
    assert (paid.cost.nfe, paid.cost.recomputed_tokens) == (length, 0)
    assert (again.cost.nfe, again.cost.recomputed_tokens) == (length - 1, len(root.prompt))
    assert (second.nfe, second.recomputed_tokens) == (length - 1, len(root.prompt))
