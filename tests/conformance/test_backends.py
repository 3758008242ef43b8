"""Laws that every LogitsModel must keep (docs/architecture/search.md)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sdt_dist.errors import ContextError
from sdt_dist.noise import gumbel, position_key
from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest, Root
from tests.conformance.conftest import BACKENDS, TABLES, params

MANY = 4000


def full_row(model, backend, root: Root, tokens: tuple[int, ...] = ()) -> np.ndarray:
    """log p [V] of a state through an expansion of everything."""
    (reply,) = model.expand([ExpandRequest(root, tokens, model.vocab_size)], backend.law)
    row = np.full(model.vocab_size, -np.inf)
    row[reply.children] = reply.log_prob
    return row


def test_log_probs_normalise(backend):
    model = backend.make()
    root = backend.root()
    prefix = backend.path(model, root, backend.max_new - 1)
    for depth in (0, 1, len(prefix)):
        row = full_row(model, backend, root, prefix[:depth])
        assert np.exp(row).sum() == pytest.approx(1.0, abs=1e-12)
        (part,) = model.expand([ExpandRequest(root, prefix[:depth], 3)], backend.law)
        assert np.exp(part.log_prob).sum() + np.exp(part.log_residual) == pytest.approx(
            1.0, abs=1e-12
        )
        assert part.num_remaining == backend.law.allowed[1] - 3


@pytest.mark.parametrize("backend", params(BACKENDS.keys() - TABLES), indirect=True)
def test_agrees_with_transformers(backend):
    """Rows of p at several prompts and depths, within 1e-4 of the module's own forward pass in float32."""
    (module,) = backend.modules
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    model = backend.make()
    for number in range(3):
        root = backend.root(number)
        prefix = backend.path(model, root, backend.max_new - 1)
        with torch.inference_mode():
            logits = module(input_ids=torch.tensor([[*root.prompt, *prefix]])).logits[0]
        expected = torch.log_softmax(logits.double(), -1).numpy()[len(root.prompt) - 1 :]
        for depth in (0, 1, len(prefix) // 2, len(prefix)):
            row = full_row(model, backend, root, prefix[:depth])
            np.testing.assert_allclose(row, expected[depth], rtol=0.0, atol=1e-4)


def test_expansions_are_the_top_k_and_with_a_key_the_gumbel_top_k(backend):
    model = backend.make()
    root = backend.root()
    row = full_row(model, backend, root)
    (top,) = model.expand([ExpandRequest(root, (), 4)], backend.law)
    assert top.children.tolist() == np.argsort(-row, kind="stable")[:4].tolist()
    (keyed,) = model.expand([ExpandRequest(root, (), 4, key=77)], backend.law)
    noise = gumbel(np.array([77], dtype=np.uint64), model.vocab_size)[0]
    assert keyed.children.tolist() == np.argsort(-(row + noise))[:4].tolist()
    np.testing.assert_allclose(keyed.log_prob, row[keyed.children], atol=1e-12)


def test_excluded_tokens_are_masked_and_log_probs_are_of_the_unmasked_law(backend):
    model = backend.make()
    root = backend.root()
    row = full_row(model, backend, root)
    first = int(np.argmax(row))
    (reply,) = model.expand([ExpandRequest(root, (), 2, excluded=(first,))], backend.law)
    assert first not in reply.children
    np.testing.assert_allclose(reply.log_prob, row[reply.children], atol=1e-12)
    outside = 1 - np.exp(row[[first, *reply.children]]).sum()
    assert np.exp(reply.log_residual) == pytest.approx(outside, abs=1e-9)
    for key in range(20):
        (draw,) = model.rollout([RolloutRequest(root, (), 1, key, (first,))], backend.law)
        token = int(draw.tokens[0])
        assert token != first
        assert draw.log_prob[0] == pytest.approx(row[token], abs=1e-12)
        assert np.exp(draw.log_residual[0]) == pytest.approx(
            1 - np.exp(row[[first, token]]).sum(), abs=1e-9
        )


def test_rollouts_report_the_rows_they_passed(backend):
    model = backend.make()
    root = backend.root()
    within = max(2e-6, backend.tolerance)
    (reply,) = model.rollout([RolloutRequest(root, (), 5, 5)], backend.law)
    for step, token in enumerate(reply.tokens.tolist()):
        row = full_row(model, backend, root, tuple(reply.tokens[:step].tolist()))
        assert reply.log_prob[step] == pytest.approx(row[token], abs=within)
        assert np.exp(reply.log_residual[step]) == pytest.approx(1 - np.exp(row[token]), abs=within)
        noise = gumbel(np.array([position_key(5, step)], dtype=np.uint64), model.vocab_size)[0]
        assert token == int(np.argmax(row + noise))


def _requests(backend, count: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(backend.root(i % 3), (), backend.max_new - i % 2, 1000 + i)
        for i in range(count)
    ]


def test_batched_equals_single_and_repeats(backend):
    """Bitwise on torch's CPU: alone, in batches of several sizes, beside other prompts and at other depths."""
    requests = _requests(backend, 13)
    together = backend.make().rollout(requests, backend.law)
    model = backend.make()
    assert all(
        backend.same(model.rollout([r], backend.law)[0], t)
        for r, t in zip(requests, together, strict=True)
    )
    assert all(
        backend.same(a, b)
        for a, b in zip(
            backend.make().rollout(requests[3:9], backend.law), together[3:9], strict=True
        )
    )


def test_cached_equals_uncached_and_equal_after_eviction(backend):
    root = backend.root(1)
    warm = backend.make()
    prefix = backend.path(warm, root, backend.max_new - 2)
    request = RolloutRequest(root, prefix, 2, 99)
    cold = backend.make()
    tight = backend.make(cache_bytes=2000)
    backend.path(tight, root, backend.max_new - 2)
    replies = [model.rollout([request], backend.law)[0] for model in (warm, cold, tight)]
    assert backend.same(replies[0], replies[1])
    assert backend.same(replies[0], replies[2])


def test_two_cached_prefixes_with_the_same_suffix_at_once(backend):
    model = backend.make()
    roots = [backend.root(i) for i in (0, 1)]
    suffix = backend.path(model, roots[0], 3)
    model.rollout([RolloutRequest(root, (), 4, 5) for root in roots], backend.law)
    pair = [RolloutRequest(root, suffix, 2, 8) for root in roots]
    together = model.rollout(pair, backend.law)
    apart = [backend.make().rollout([request], backend.law)[0] for request in pair]
    assert all(backend.same(a, b) for a, b in zip(together, apart, strict=True))


def test_siblings_of_a_new_prefix_in_one_call(backend):
    root = backend.root(2)
    prefix = backend.path(backend.make(), root, 3)
    requests = [ExpandRequest(root, (*prefix, token), 2) for token in backend.tokens(6)]
    requests += [ExpandRequest(root, prefix[:depth], 2) for depth in range(3)]
    together = backend.make().expand(requests, backend.law)
    assert all(backend.same(a, b) for a, b in zip(together, backend.alone(requests), strict=True))


def test_seeded_rollouts_follow_p(backend):
    model = backend.make()
    root = backend.root()
    row = np.exp(full_row(model, backend, root))
    draws = model.rollout([RolloutRequest(root, (), 1, 31 * i) for i in range(MANY)], backend.law)
    counts = np.bincount([int(d.tokens[0]) for d in draws], minlength=model.vocab_size)
    assert _p_value(counts, row) > 1e-3


def test_seeded_rollouts_follow_p_over_whole_sequences(backend):
    """Two tokens of a law with four, so that all 16 sequences are likely; p is that of expansions."""
    last = backend.law.allowed[1]
    model = backend.make()
    root = backend.root()
    law = PriorLaw((last - 4, last))
    (first,) = model.expand([ExpandRequest(root, (), 4)], law)
    seconds = model.expand([ExpandRequest(root, (int(token),), 4) for token in first.children], law)
    p = np.zeros((4, 4))
    counts = np.zeros((4, 4))
    for token, log_prob, second in zip(first.children, first.log_prob, seconds, strict=True):
        p[token - last + 4, second.children - last + 4] = np.exp(log_prob + second.log_prob)
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    for draw in model.rollout([RolloutRequest(root, (), 2, 77 * i) for i in range(MANY)], law):
        counts[tuple(draw.tokens - last + 4)] += 1
    assert _p_value(counts.ravel(), p.ravel()) > 1e-3


def _p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Of a chi-square test of counts [n] against probabilities [n]; rare outcomes count as one."""
    expected = p * MANY
    likely = expected >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    kept = wanted > 0
    assert not observed[~kept].any(), "an outcome of probability 0"
    return stats.chisquare(
        observed[kept], wanted[kept] * observed[kept].sum() / wanted[kept].sum()
    ).pvalue


def test_end_tokens_finish_and_lengths_limit(backend):
    requests = _requests(backend, 40)
    replies = backend.make().rollout(requests, backend.law)
    for request, reply in zip(requests, replies, strict=True):
        tokens = reply.tokens.tolist()
        assert not set(tokens[:-1]) & set(backend.law.end_tokens)
        assert (reply.finish_reason == "eos") == (tokens[-1] in backend.law.end_tokens)
        assert len(tokens) == request.num_tokens or (
            reply.finish_reason == "eos" and len(tokens) < request.num_tokens
        )
    if backend.law.end_tokens:
        assert {reply.finish_reason for reply in replies} == {"eos", "length"}


def test_empty_and_over_long_prompts_are_refused(backend):
    model = backend.make()
    too_long = tuple([4] * (model.max_context + 1))
    for prompt in ((), too_long):
        with pytest.raises(ContextError):
            model.rollout([RolloutRequest(Root(prompt, b"x"), (), 1, 0)], backend.law)
        with pytest.raises(ContextError):
            model.expand([ExpandRequest(Root(prompt, b"x"), (), 1)], backend.law)


def test_the_context_holds_what_it_says_and_a_refusal_costs_nothing(backend):
    """Prompt, known and new tokens fit up to max_context; one more is refused, before anything is computed."""
    model = backend.make()
    law = PriorLaw(backend.law.allowed)
    root = backend.root()
    room = model.max_context - len(backend.root().prompt)
    known = tuple(backend.tokens(room))
    fits = [RolloutRequest(root, (), room, 1), RolloutRequest(root, known[:-1], 1, 2)]
    for request in fits:
        longer = RolloutRequest(root, request.tokens, request.num_tokens + 1, request.key)
        with pytest.raises(ContextError, match=f"context of {model.max_context}"):
            model.rollout([request, longer], law)
    with pytest.raises(ContextError, match=f"context of {model.max_context}"):
        model.expand([ExpandRequest(root, (), 2), ExpandRequest(root, known, 2)], law)
    assert (model.nfe, model.model_calls) == (0, 0)
    assert [len(reply.tokens) for reply in model.rollout(fits, law)] == [room, 1]
    (last,) = model.expand([ExpandRequest(root, known[:-1], 2)], law)
    assert len(last.children) == 2


def test_replies_add_up_to_the_counters(backend):
    model = backend.make()
    replies = [*model.rollout(_requests(backend, 9), backend.law)]
    prefix = tuple(replies[0].tokens[:2].tolist())
    replies += model.expand(
        [ExpandRequest(backend.root(0), prefix, 3), ExpandRequest(backend.root(5), (), 3)],
        backend.law,
    )
    assert sum(reply.cost.nfe for reply in replies) == model.nfe
    assert frozenset().union(*(reply.cost.calls for reply in replies)) == frozenset(
        range(model.model_calls)
    )


def test_a_forward_hook_counts_the_same_calls(backend):
    """ModuleDecoder calls the module; the lean decoder is counted by the batches it feeds and prompts it encodes."""
    if not backend.modules or type(backend.modules[0]).__name__ != "GPT2LMHeadModel":
        model = backend.make()
        model.rollout(_requests(backend, 5), backend.law)
        assert model.nfe >= model.model_calls - 3
        return
    calls = []
    handle = backend.modules[0].register_forward_hook(lambda *_: calls.append(1))
    model = backend.make()
    model.rollout(_requests(backend, 5), backend.law)
    handle.remove()
    assert len(calls) == model.model_calls


@pytest.mark.parametrize("options", [{"sampling_temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}])
def test_the_law_is_one_definition_for_expansions_and_rollouts(backend, options):
    model = backend.make()
    root = backend.root()
    plain = full_row(model, backend, root)
    law = PriorLaw(backend.law.allowed, backend.law.end_tokens, **options)
    (reply,) = model.expand([ExpandRequest(root, (), model.vocab_size)], law)
    if "sampling_temperature" in options:
        expected = 2 * plain - np.logaddexp.reduce(2 * plain[np.isfinite(plain)])
        np.testing.assert_allclose(reply.log_prob, expected[reply.children], atol=1e-9)
    else:
        kept = plain[reply.children]
        np.testing.assert_allclose(reply.log_prob, kept - np.logaddexp.reduce(kept), atol=1e-9)
        assert len(reply.children) == 3 if "top_k" in options else np.exp(kept).sum() >= 0.6
    draws = model.rollout([RolloutRequest(root, (), 1, i) for i in range(50)], law)
    assert {int(d.tokens[0]) for d in draws} <= set(reply.children.tolist())
    table = dict(zip(reply.children.tolist(), reply.log_prob.tolist(), strict=True))
    assert all(d.log_prob[0] == pytest.approx(table[int(d.tokens[0])], abs=1e-12) for d in draws)
