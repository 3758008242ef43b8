"""Laws of the proposal q(a|s) ~ p(a|s) exp(lambda F(s a)) that every backend that holds flows must keep.

See docs/concepts/flow.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from sdt_dist.errors import ConfigurationError
from sdt_dist.noise import gumbel, position_key, proposal_key
from sdt_dist.protocols import ExpandRequest, Rollout, RolloutRequest, State, Tilt
from tests.conformance.conftest import params
from tests.conformance.test_backends import full_row
from tests.http_helpers import RunningServer, tokens_card

STRENGTH = 2.0


class LastTokenFlow:
    """F(s a) from a table by the last two tokens; its identity is its seed."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.identity = f"last token {seed}"
        self._table = np.random.default_rng(seed).standard_normal((vocab_size, vocab_size))

    def log_tilts(
        self, states: Sequence[State], inverse_temperature: float, log_prob: np.ndarray
    ) -> np.ndarray:
        return inverse_temperature * np.stack(
            [self._table[(*root.prompt, *tokens)[-1]] for root, tokens in states]
        )

    def values(self, states: Sequence[State], inverse_temperature: float) -> np.ndarray:
        return np.zeros(len(states))


holds_flows = pytest.mark.parametrize(
    "backend",
    params(("hf-llama", "hf-llama-gqa", "hf-module", "interface", "mlx-llama", "toy")),
    indirect=True,
)


@pytest.fixture
def model(backend):
    """A fresh model that holds two flows."""
    model = backend.make()
    model.load_flow(LastTokenFlow(model.vocab_size))
    model.load_flow(LastTokenFlow(model.vocab_size, 1))
    return model


def tilt(draws: str, seed: int = 0) -> Tilt:
    return Tilt(f"last token {seed}", STRENGTH, draws)  # type: ignore[arg-type]


def rows(model, backend, tokens: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p, log q and lambda F [V] of a state."""
    root = backend.root()
    log_p = full_row(model, backend, root, tokens)
    (tilts,) = LastTokenFlow(model.vocab_size).log_tilts(
        [(root, tokens)], STRENGTH, np.zeros((1, model.vocab_size))
    )
    log_q = log_p + tilts
    return log_p, log_q - np.logaddexp.reduce(log_q), tilts


def outside(log_law: np.ndarray, tokens: Sequence[int]) -> float:
    return float(np.logaddexp.reduce(np.delete(log_law, list(tokens)), initial=-np.inf))


@holds_flows
@pytest.mark.parametrize("draws", ["p", "q"])
def test_rollouts_report_both_laws_of_what_one_of_them_drew(backend, model, draws):
    root = backend.root()
    within = max(5e-6, 10 * backend.tolerance)
    key = 41
    excluded = (int(np.argmax(full_row(model, backend, root))),)
    (reply,) = model.rollout([RolloutRequest(root, (), 4, key, excluded, tilt(draws))], backend.law)
    for step, token in enumerate(reply.tokens.tolist()):
        log_p, log_q, tilts = rows(model, backend, tuple(reply.tokens[:step].tolist()))
        left_out = excluded if step == 0 else ()
        row_key = position_key(key, step)
        law, law_key = (
            (log_p, row_key) if draws == "p" else (log_q, proposal_key(row_key, "last token 0"))
        )
        perturbed = law + gumbel(np.array([law_key], dtype=np.uint64), model.vocab_size)[0]
        perturbed[list(left_out)] = -np.inf
        assert token == int(np.argmax(perturbed))
        assert reply.log_prob[step] == pytest.approx(log_p[token], abs=within)
        assert reply.log_proposal[step] == pytest.approx(log_q[token], abs=within)
        assert reply.log_residual[step] == pytest.approx(
            outside(log_p, (*left_out, token)), abs=within
        )
        assert reply.log_residual_proposal[step] == pytest.approx(
            outside(log_q, (*left_out, token)), abs=within
        )
        assert reply.log_tilt[step] == pytest.approx(tilts[token], abs=1e-12)


@holds_flows
def test_draws_from_p_beside_a_flow_are_those_without_one(backend, model):
    request = RolloutRequest(backend.root(), (), backend.max_new, 5)
    plain, beside = (
        model.rollout([r], backend.law)[0] for r in (request, replace(request, tilt=tilt("p")))
    )
    assert (
        plain.log_proposal is None
        and plain.log_residual_proposal is None
        and plain.log_tilt is None
    )
    assert beside.tokens.tolist() == plain.tokens.tolist()
    for name in ("log_prob", "log_residual", "num_remaining"):
        np.testing.assert_allclose(
            getattr(beside, name), getattr(plain, name), rtol=0, atol=backend.tolerance
        )


@holds_flows
@pytest.mark.parametrize("key", [None, 7])
def test_children_come_in_the_order_of_the_law_that_is_asked(backend, model, key):
    root = backend.root()
    log_p, log_q, tilts = rows(model, backend, ())
    excluded = (int(np.argmax(log_q)),)
    (reply,) = model.expand([ExpandRequest(root, (), 3, key, excluded, tilt("q"))], backend.law)
    order = log_q.copy()
    if key is not None:
        order += gumbel(
            np.array([proposal_key(key, "last token 0")], dtype=np.uint64), model.vocab_size
        )[0]
    order[list(excluded)] = -np.inf
    children = reply.children.tolist()
    assert children == np.argsort(-order)[:3].tolist()
    np.testing.assert_allclose(reply.log_prob, log_p[children], atol=1e-9)
    np.testing.assert_allclose(reply.log_proposal, log_q[children], atol=1e-9)
    np.testing.assert_allclose(reply.log_tilt, tilts[children], atol=1e-12)
    assert reply.log_residual == pytest.approx(outside(log_p, (*excluded, *children)), abs=1e-9)
    assert reply.log_residual_proposal == pytest.approx(
        outside(log_q, (*excluded, *children)), abs=1e-9
    )


def same(backend, left: Rollout, right: Rollout) -> bool:
    """Equal tokens and nearly equal columns; whether bits depend on the batch is `test_backends`' matter."""
    names = ("log_prob", "log_residual", "log_proposal", "log_residual_proposal", "log_tilt")
    pairs = [(getattr(left, name), getattr(right, name)) for name in names]
    return left.tokens.tolist() == right.tokens.tolist() and all(
        (a is None and b is None) or np.allclose(a, b, rtol=0.0, atol=max(5e-6, backend.tolerance))
        for a, b in pairs
    )


@holds_flows
def test_a_batch_may_mix_laws_and_flows(backend, model):
    """Rows without a tilt, with two flows, and with draws from p and q: each as if alone."""
    tilts = [None, tilt("q"), tilt("p", 1), tilt("q", 1), tilt("p"), None]
    requests = [
        RolloutRequest(
            backend.root(i % 2), (), backend.max_new - i % 2, 100 + i, (), tilts[i % len(tilts)]
        )
        for i in range(12)
    ]
    together = model.rollout(requests, backend.law)
    assert all(
        same(backend, model.rollout([r], backend.law)[0], t)
        for r, t in zip(requests, together, strict=True)
    )


class _Broken(LastTokenFlow):
    def log_tilts(
        self, states: Sequence[State], inverse_temperature: float, log_prob: np.ndarray
    ) -> np.ndarray:
        return super().log_tilts(states, inverse_temperature, log_prob) + np.nan


@holds_flows
def test_flows_that_are_unknown_or_broken_are_named(backend, model):
    request = RolloutRequest(backend.root(), (), 2, 1, (), Tilt("other", STRENGTH, "q"))
    with pytest.raises(ConfigurationError, match="flow 'other' is not held"):
        model.rollout([request], backend.law)
    model.load_flow(_Broken(model.vocab_size))
    with pytest.raises(ConfigurationError, match="flow 'last token 0': log_tilts returned"):
        model.rollout([replace(request, tilt=tilt("q"))], backend.law)


@pytest.mark.parametrize(
    "backend", params(("http-toy", "http-llama", "vllm-llama", "http-vllm")), indirect=True
)
def test_a_backend_without_the_flow_refuses_tilts(backend):
    for request in (
        RolloutRequest(backend.root(), (), 2, 1, tilt=tilt("q")),
        ExpandRequest(backend.root(), (), 2),
    ):
        tilted = replace(request, tilt=tilt("q"))
        ask = (
            backend.make().rollout if isinstance(request, RolloutRequest) else backend.make().expand
        )
        with pytest.raises(ConfigurationError, match="tilt"):
            ask([tilted], backend.law)


@holds_flows
def test_tilts_work_through_a_server_whose_model_holds_the_flow(backend, model):
    server = RunningServer(model, tokens_card(model, backend.law))
    try:
        client = server.client()
        requests = [
            RolloutRequest(backend.root(), (), 4, i, (), t)
            for i, t in enumerate([tilt("q"), None, tilt("p", 1)])
        ]
        found = client.rollout(requests, backend.law)
        wanted = model.rollout(requests, backend.law)
        assert all(same(backend, *pair) for pair in zip(found, wanted, strict=True))
        (children,) = client.expand(
            [ExpandRequest(backend.root(), (), 3, 5, (), tilt("q"))], backend.law
        )
        assert children.log_proposal is not None and children.log_tilt is not None
    finally:
        server.close()
