"""The hf backend against Transformers itself, and its prefix cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sdt_dist.models.hf.model import HFModel
from sdt_dist.models.hf.module_decoder import ModuleDecoder
from sdt_dist.protocols import ExpandRequest, RolloutRequest
from tests.conformance.conftest import BACKENDS


@pytest.mark.parametrize("name", ["hf-llama", "hf-llama-gqa", "hf-module"])
def test_scores_agree_with_the_module(name):
    backend = BACKENDS[name]()
    model, root = backend.make(), backend.root()
    (reply,) = model.rollout([RolloutRequest(root, (), 12, 3)], backend.law)
    ids = torch.tensor([[*root.prompt, *reply.tokens.tolist()]])
    with torch.inference_mode():
        log_probs = torch.log_softmax(backend.modules[0](input_ids=ids).logits[0].double(), -1)
    first = len(root.prompt) - 1
    expected = [float(log_probs[first + j, token]) for j, token in enumerate(reply.tokens.tolist())]
    np.testing.assert_allclose(reply.log_prob, expected, atol=1e-5)


def test_the_lean_decoder_agrees_with_the_module_decoder():
    backend = BACKENDS["hf-llama-gqa"]()
    lean, plain = backend.make(), HFModel(backend.modules[0])
    plain._decoder = ModuleDecoder(backend.modules[0])
    requests = [RolloutRequest(backend.root(i), (), 15, i) for i in range(5)]
    for a, b in zip(lean.rollout(requests, backend.law), plain.rollout(requests, backend.law), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.log_prob, b.log_prob, atol=1e-4)


def test_the_cache_saves_work_and_eviction_is_counted():
    backend = BACKENDS["hf-llama"]()
    roomy, tight = backend.make(), backend.make(cache_bytes=1)
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
    first, second, root = backend.make(), backend.make(), backend.root()
    (paid,) = first.rollout([RolloutRequest(root, (), 4, key=1)], backend.law)
    (again,) = second.rollout([RolloutRequest(replace(root, paid=True), (), 4, key=1)], backend.law)
    length = len(paid.tokens)
    assert again.tokens.tolist() == paid.tokens.tolist()
    assert (paid.cost.nfe, paid.cost.recomputed_tokens) == (length, 0)
    assert (again.cost.nfe, again.cost.recomputed_tokens) == (length - 1, len(root.prompt))
    assert (second.nfe, second.recomputed_tokens) == (length - 1, len(root.prompt))
