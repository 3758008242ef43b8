"""Rows stay with their requests, whatever vLLM's scheduler does: preemption, partial prefills, asynchrony, abortion."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import AsyncEngineArgs

from sdt_dist.models.hf.model import HFModel
from sdt_dist.models.remote.calls import ModelCall
from sdt_dist.models.remote.wire import pack_requests, unpack_replies
from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest, Root, prompt_digest
from sdt_dist.serving.server import ModelServer
from tests.vllm.conftest import LAW, VOCABULARY, root, same

pytestmark = pytest.mark.vllm
ENDLESS = PriorLaw((0, VOCABULARY))


def _rollouts(count: int, length: int, prompt: int = 20) -> list[RolloutRequest]:
    return [RolloutRequest(root(i, prompt), (), length - i % 5, 100 + i) for i in range(count)]


def _all_same(left, right) -> bool:
    return all(same(a, b) for a, b in zip(left, right, strict=True))


def _preemptions() -> float:
    found = [m for m in REGISTRY.collect() if m.name == "vllm:num_preemptions"]
    return sum(
        sample.value for m in found for sample in m.samples if sample.name.endswith("_total")
    )


@pytest.fixture(params=["in turn", "asynchronous"])
def scheduling(request, monkeypatch) -> None:
    """vLLM's two schedulers; on a CPU it takes the first one unless it is made to take the other."""
    made = AsyncEngineArgs.create_engine_config

    def make(self, *arguments, **options):
        config = made(self, *arguments, **options)
        config.scheduler_config.async_scheduling = request.param == "asynchronous"
        return config

    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", make)


@pytest.mark.usefixtures("scheduling")
def test_preempted_requests_go_on_with_their_own_rows(opened, plain):
    """Room for 8 blocks of 32 positions: requests that begin in one block each grow to four, and preempt one another."""
    model = opened(num_gpu_blocks_override=9, disable_log_stats=False)
    before = _preemptions()
    paid = 0
    for law in (ENDLESS, LAW):
        requests = _rollouts(12, 100)
        replies = model.rollout(requests, law)
        assert _all_same(replies, plain.rollout(requests, law))
        paid += sum(reply.cost.nfe for reply in replies)
    assert _preemptions() > before
    assert paid == model.nfe


def test_rows_of_unfinished_prefills_count_for_nothing(opened, plain):
    """At most 48 tokens a step, so that most prompts of 100 take three steps, each of which samples something."""
    model = opened(max_num_batched_tokens=48, max_num_seqs=8)
    requests = _rollouts(9, 20, prompt=100)
    replies = model.rollout(requests, LAW)
    assert _all_same(replies, plain.rollout(requests, LAW))
    prefix = tuple(replies[0].tokens[:2].tolist())
    expand = [ExpandRequest(request.root, prefix, 5, key=7) for request in requests]
    for found, wanted in zip(model.expand(expand, LAW), plain.expand(expand, LAW), strict=True):
        assert found.children.tolist() == wanted.children.tolist()
        np.testing.assert_allclose(found.log_prob, wanted.log_prob, atol=1e-4)


def test_calls_of_several_threads_and_laws_share_steps(opened, plain):
    model = opened()
    sharp = PriorLaw((4, 40), (), sampling_temperature=0.7, top_k=9, top_p=0.9)
    roots = [root(i) for i in range(3)]
    jobs = [
        (
            lambda m, i=i: m.rollout(
                [RolloutRequest(roots[i % 3], (5 + i,), 40, i)], sharp if i % 2 else LAW
            )
        )
        if i % 3
        else (
            lambda m, i=i: m.expand(
                [ExpandRequest(roots[i % 3], (5 + i, 6), 4, i, (7,))], sharp if i % 2 else LAW
            )
        )
        for i in range(12)
    ]
    before = model.model_calls
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: job(model), jobs))
    for job, (reply,) in zip(jobs, found, strict=True):
        (wanted,) = job(plain)
        left, right = (
            getattr(r, "tokens", getattr(r, "children", None)).tolist() for r in (reply, wanted)
        )
        assert left == right
        np.testing.assert_allclose(reply.log_prob, wanted.log_prob, atol=1e-4)
    assert model.model_calls - before < 150, (
        "the jobs did not share steps: apart they take over 300"
    )


def test_a_caller_that_leaves_disturbs_nobody(opened, plain):
    """One of the server's callers is cancelled while its rollout runs beside others in the engine."""
    model = opened()
    requests = [RolloutRequest(root(i), (), 90, i) for i in range(4)]

    async def main() -> list:
        server = ModelServer(model)
        calls = [
            ModelCall(f"call {i}", pack_requests([r], ENDLESS), 60.0)
            for i, r in enumerate(requests)
        ]
        tasks = [asyncio.create_task(server.answer(call)) for call in calls]
        while server.counters.waiting_calls or not model.model_calls:
            await asyncio.sleep(0.001)
        tasks[1].cancel()
        rest = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(rest[1], asyncio.CancelledError)
        rest[1] = await server.answer(calls[1])
        server.close()
        return [unpack_replies(answer.packed)[0] for answer in rest]

    assert _all_same(asyncio.run(main()), plain.rollout(requests, ENDLESS))


def test_asked_for_nothing_but_cached_prefixes_the_hit_rate_shows_it(opened):
    model = opened()
    base = root(1, 96)
    model.rollout([RolloutRequest(base, (), 33, 1)], ENDLESS)
    prefix = model.prefix_tokens
    reused = model.reused_tokens
    model.expand([ExpandRequest(base, (5,), 3)], ENDLESS)
    assert model.prefix_tokens - prefix == 97, "the prompt and the known token"
    assert model.reused_tokens - reused == 96, "96 positions are three whole blocks"
    assert model.expand([ExpandRequest(base, (6,), 3)], ENDLESS)[0].cost.recomputed_tokens == 0


def test_prefixes_are_counted_once_a_request_as_by_other_backends(opened, plain):
    model = opened()
    base = root(8)
    kept = HFModel(plain.module)
    for m in (model, kept):
        m.rollout([RolloutRequest(base, (), 20, i) for i in range(6)], ENDLESS)
        m.expand(
            [
                ExpandRequest(base, (5, 6), 3),
                ExpandRequest(base, (), 3),
                ExpandRequest(root(9), (4,), 2),
            ],
            ENDLESS,
        )
    assert model.prefix_tokens == kept.prefix_tokens == 6 * 40 + 42 + 40 + 41
    assert (model.nfe, 0) == (
        kept.nfe,
        model.expand([ExpandRequest(base, (7,), 0)], ENDLESS)[0].children.size,
    )


def test_embeddings_of_the_prompt_answer_as_its_tokens_do(opened, plain):
    model = opened(prompt_embeddings=True)
    by_tokens = root(3)
    table = plain.module.get_input_embeddings().weight.detach().numpy()
    embeddings = table[list(by_tokens.prompt[:30])]
    placeholders = (0,) * 30 + by_tokens.prompt[30:]
    by_embeddings = Root(
        placeholders, prompt_digest(by_tokens.prompt) + b"e", embeddings=embeddings
    )
    left, right = (
        model.rollout([RolloutRequest(r, (), 20, i) for i in range(4)], LAW)
        for r in (by_embeddings, by_tokens)
    )
    assert _all_same(left, right)
    assert _all_same(
        right, plain.rollout([RolloutRequest(by_tokens, (), 20, i) for i in range(4)], LAW)
    )
    other = Root(placeholders, b"other", embeddings=embeddings[::-1].copy())
    assert not _all_same(
        model.rollout([RolloutRequest(other, (), 20, i) for i in range(4)], LAW), right
    )
