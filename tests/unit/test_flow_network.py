"""The flow network and its inference: causal, the same step by step as teacher-forced, and bits of a state its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.flow.checkpoint import FlowInfo
from sdt_dist.flow.features import FLOOR_SHARE, reference_power, welch_basis
from sdt_dist.flow.flow import Flow
from sdt_dist.flow.heads import build_network
from sdt_dist.flow.network import FlowNetwork
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.flow.spectral_head import SpectralNetwork
from sdt_dist.metrics.spectrum import power_spectrum, reference_spectrum
from sdt_dist.models.card import card_of
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import Root, prompt_digest

pytestmark = pytest.mark.usefixtures("one_thread")
SPECS = {
    "values": FlowSpec(
        34,
        (2, 34),
        60,
        values=(-3.0, 3.0),
        context_length=20,
        patch=3,
        hidden_size=24,
        num_layers=2,
    ),
    "ids": FlowSpec(30, (0, 25), 10, context_length=7, hidden_size=16, key_size=8),
}
INFO = FlowInfo("model", "reward", (0.5, 20.0))


@pytest.fixture(params=SPECS)
def network(request: pytest.FixtureRequest) -> Iterator[FlowNetwork]:
    torch.manual_seed(0)
    network = build_network(SPECS[request.param])
    network.set_scale(0.3, 2.0)
    with torch.inference_mode():
        yield network.eval()


def random_states(spec: FlowSpec, count: int, seed: int = 0) -> list[tuple[Root, tuple[int, ...]]]:
    """States of all lengths below max_new_tokens after prompts of lengths up to twice the context length."""
    rng = np.random.default_rng(seed)
    prompts = [
        tuple(rng.integers(0, spec.vocab_size, n).tolist())
        for n in rng.integers(1, 2 * spec.context_length, 5)
    ]
    roots = [Root(prompt, prompt_digest(prompt)) for prompt in prompts]
    lengths = rng.integers(0, spec.max_new_tokens, count)
    return [
        (roots[i % 5], tuple(rng.integers(*spec.allowed, n).tolist()))
        for i, n in enumerate(lengths)
    ]


def teacher_forced(
    network: FlowNetwork, root: Root, tokens: tuple[int, ...], tilt: float
) -> tuple[np.ndarray, np.ndarray]:
    prompt = torch.tensor([[*root.prompt, 0, 0]])  # padding must not matter
    ids = torch.tensor([tokens], dtype=torch.long)
    hidden = network.hidden(
        network.context(prompt, torch.tensor([len(root.prompt)]), torch.tensor([tilt])), ids
    )
    low, high = network.spec.allowed
    log_prob = torch.from_numpy(
        rows(network.spec, [(root, tokens[:t]) for t in range(len(tokens) + 1)])[:, low:high]
    )
    values = network.values_of(torch.arange(low, high)).double()
    of_p = network.moments(log_prob, values).float()[None]
    return network.state_values(hidden)[0].double().numpy(), network.token_values(hidden, of_p)[
        0
    ].double().numpy()


def rows(spec: FlowSpec, states: Sequence[tuple[Root, tuple[int, ...]]]) -> np.ndarray:
    """Some law p for each state, the same whenever it is asked for: log p [B, V]."""
    found = np.full((len(states), spec.vocab_size), -np.inf)
    for row, (root, tokens) in zip(found, states, strict=True):
        rng = np.random.default_rng([*root.prompt, len(tokens), *tokens])
        logits = 2 * rng.standard_normal(spec.num_tokens)
        row[slice(*spec.allowed)] = logits - np.logaddexp.reduce(logits)
    return found


def tilts_of(flow: Flow, states: Sequence[tuple[Root, tuple[int, ...]]], tilt: float) -> np.ndarray:
    return flow.log_tilts(states, tilt, rows(flow.spec, states))


def test_inference_equals_teacher_forcing(network: FlowNetwork) -> None:
    flow, (low, high) = Flow(network, INFO), network.spec.allowed
    states = random_states(network.spec, 12)
    tilts = tilts_of(flow, states, 4.0)
    values = flow.values(states, 4.0)
    assert (
        tilts.shape == (12, network.spec.vocab_size) and tilts.dtype == values.dtype == np.float64
    )
    for (root, tokens), row, value in zip(states, tilts, values, strict=True):
        state, token = teacher_forced(network, root, tokens, 4.0)
        np.testing.assert_allclose(row[low:high], 4.0 * token[-1], atol=2e-5)
        assert not row[:low].any() and not row[high:].any()
        assert value == pytest.approx(state[-1], abs=1e-5)


def test_bits_do_not_depend_on_companions_or_the_cache(network: FlowNetwork) -> None:
    states = random_states(network.spec, 40)
    together = tilts_of(Flow(network, INFO), states, 2.0)
    small = Flow(network, INFO, cache_bytes=1)
    for i, state in enumerate(states[:15]):
        assert (tilts_of(small, [state], 2.0)[0] == together[i]).all()
        assert (tilts_of(Flow(network, INFO), [states[-1], state], 2.0)[1] == together[i]).all()
    warm = Flow(network, INFO)
    warm.values(states[::-1], 2.0)
    assert (tilts_of(warm, states[::-1], 2.0)[::-1] == together).all()
    warm.release(states[0][0])
    assert (tilts_of(warm, states, 2.0) == together).all()


def test_the_network_is_causal(network: FlowNetwork) -> None:
    root, _ = random_states(network.spec, 1)[0]
    rng = np.random.default_rng(3)
    tokens = tuple(rng.integers(*network.spec.allowed, 9).tolist())
    state, token = teacher_forced(network, root, tokens, 1.0)
    for cut in (0, 4, 8):
        shorter_state, shorter_token = teacher_forced(network, root, tokens[:cut], 1.0)
        np.testing.assert_allclose(shorter_state, state[: cut + 1], atol=1e-5)
        np.testing.assert_allclose(shorter_token, token[: cut + 1], atol=1e-5)


def test_the_network_sees_prompt_tokens_and_inverse_temperature(network: FlowNetwork) -> None:
    (root, tokens), *_ = random_states(network.spec, 1)
    other = Root((*root.prompt[:-1], (root.prompt[-1] + 1) % network.spec.vocab_size), b"other")
    base = teacher_forced(network, root, tokens, 1.0)[0]
    assert np.abs(teacher_forced(network, other, tokens, 1.0)[0] - base).min() > 0
    assert np.abs(teacher_forced(network, root, tokens, 8.0)[0] - base).min() > 0


def test_candidates_are_the_tokens_own_values(network: FlowNetwork) -> None:
    """By gathering from all tokens, or from the candidates alone."""
    (root, tokens), *_ = random_states(network.spec, 1)
    context = network.context(
        torch.tensor([root.prompt]), torch.tensor([len(root.prompt)]), torch.tensor([3.0])
    )
    hidden = network.hidden(context, torch.tensor([tokens], dtype=torch.long))
    of_p = torch.tensor([0.3, 0.8]).expand(*hidden.shape[:2], 2)
    low = network.spec.allowed[0]
    everything = network.token_values(hidden, of_p)
    for width in (2, network.spec.num_tokens):
        ids = torch.randint(*network.spec.allowed, (*hidden.shape[:2], width))
        wanted = everything.gather(-1, ids - low)
        torch.testing.assert_close(
            network.candidate_values(hidden, ids, of_p), wanted, atol=1e-5, rtol=1e-5
        )


def test_a_vocabulary_of_128k_costs_one_product() -> None:
    spec = FlowSpec(128_000, (0, 128_000), 4, context_length=4, hidden_size=8, key_size=4)
    flow = Flow(build_network(spec), INFO)
    assert tilts_of(flow, [(Root((5,), b"a"), (127_999,))], 1.0).shape == (1, 128_000)


def test_identity_names_weights_spec_and_use(network: FlowNetwork) -> None:
    first = Flow(network, INFO).identity
    assert (
        len(first) == 32
        and first == Flow(network, replace(INFO, version=7, metrics={"loss": 1.0})).identity
    )
    assert first != Flow(network, replace(INFO, reward="other")).identity
    network.reward_mean.add_(1e-3)
    assert first != Flow(network, INFO).identity


def test_bits_do_not_depend_on_companions_where_tokens_are_few() -> None:
    """Fewer tokens than the BLAS has columns in a block."""
    torch.manual_seed(0)
    network = build_network(FlowSpec(5, (0, 5), 4, hidden_size=16, key_size=16))
    root = Root((0,), b"x")
    states = [(root, tokens) for length in range(4) for tokens in product(range(5), repeat=length)]
    together = tilts_of(Flow(network, INFO), states, 5.0)
    alone = Flow(network, INFO)
    assert all(
        (tilts_of(alone, [state], 5.0)[0] == row).all()
        for state, row in zip(states, together, strict=True)
    )


def test_states_that_a_flow_cannot_value_are_refused(network: FlowNetwork) -> None:
    flow = Flow(network, INFO)
    spec = network.spec
    root = Root((1, 2), b"r")
    full = (spec.allowed[0],) * spec.max_new_tokens
    assert np.isfinite(flow.values([(root, full)], 1.0)).all()
    with pytest.raises(ConfigurationError, match="max_new_tokens"):
        tilts_of(flow, [(root, full)], 1.0)
    with pytest.raises(ConfigurationError, match=r"0\.5 to 20\.0"):
        flow.values([(root, ())], 21.0)
    with pytest.raises(ConfigurationError, match="token ids"):
        flow.values([(root, (spec.vocab_size,))], 1.0)
    with pytest.raises(ConfigurationError, match="empty prompt"):
        flow.values([(Root((), b"e"), ())], 1.0)
    assert flow.values([], 1.0).shape == (0,) and tilts_of(flow, [], 1.0).shape == (
        0,
        spec.vocab_size,
    )


@pytest.mark.parametrize(("length", "segment"), [(48, 24), (30, 7), (9, 4), (4, 4)])
def test_the_sum_of_contributions_is_the_spectrum_of_the_metrics(length: int, segment: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, length))
    coefficients = np.einsum("bt,tsf->bsf", values, welch_basis(length, segment))
    wanted = power_spectrum(values, segment)[1]
    np.testing.assert_allclose((np.abs(coefficients) ** 2).sum(1), wanted, atol=1e-12)


def test_the_reference_is_that_of_the_reward() -> None:
    history = np.random.default_rng(1).standard_normal((2, 130))
    basis = torch.view_as_real(torch.from_numpy(welch_basis(48, 24)))
    found = reference_power(torch.from_numpy(history), torch.tensor([130, 100]), basis).numpy()
    for row, series in zip(found, (history[0], history[1, :100]), strict=True):
        wanted = reference_spectrum(series, 48, 24)
        np.testing.assert_allclose(
            row, np.maximum(wanted, 1e-6) + FLOOR_SHARE * wanted.mean(), rtol=1e-10
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("patch", 1.0),
        ("allowed", (3, 40)),
        ("values", (1.0, 1.0)),
        ("num_layers", 1000),
    ],
)
def test_specs_that_describe_no_network_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=field):
        replace(SPECS["values"], **{field: value})
    with pytest.raises(CheckpointError, match=field):
        FlowSpec.of({**SPECS["values"].to_dict(), field: value}, "file")
    assert FlowSpec.of(SPECS["values"].to_dict(), "file") == SPECS["values"]


def test_the_spec_of_a_model() -> None:
    toy = Toy(5, 4, 1.0)
    assert FlowSpec.of_card(card_of(toy), 4, hidden_size=8) == FlowSpec(5, (0, 5), 4, hidden_size=8)


def test_the_last_value_completes_the_spectrum_whatever_the_network_predicts() -> None:
    torch.manual_seed(0)
    spec = SPECS["values"]
    network = build_network(spec)
    assert isinstance(network, SpectralNetwork)
    for parameter in network.spectral.path.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(*spec.allowed, (3, spec.max_new_tokens))
    context = network.context(
        torch.randint(*spec.allowed, (3, 20)), torch.full((3,), 20), torch.full((3,), 5.0)
    )
    hidden = network.hidden(context, tokens)
    states, packed = network._split(hidden)
    of_p = torch.tensor([0.2, 0.5]).expand(3, spec.max_new_tokens, 2)
    values = network.values_of(tokens)
    mean, response, variance = network.spectral.predict(states[:, :-1], packed[:, :-1], of_p)
    reached = mean[:, -1] + (values[:, -1] - 0.2)[:, None, None, None] * response[:, -1]
    reference = torch.exp(0.5 * context[:, spec.hidden_size : -2])[:, None]
    series = values.double().numpy()
    wanted = (
        power_spectrum(series, spec.running_segment)[1]
        / reference[:, 0].detach().double().numpy() ** 2
    )
    np.testing.assert_allclose((reached.detach() ** 2).sum((1, 3)), wanted, rtol=2e-3, atol=1e-3)
    assert float(variance[:, -1].detach().max()) < 1e-4


def test_prediction_is_learnt_from_what_samples_become() -> None:
    """On persistent series the likelihood of the final coefficients rises well above that of knowing nothing."""
    torch.manual_seed(0)
    spec = FlowSpec(
        402, (2, 402), 16, values=(-4.0, 4.0), context_length=16, patch=4, segment=8, hidden_size=32
    )
    network = build_network(spec)
    rng = np.random.default_rng(0)
    series = np.zeros((96, 32))
    for t in range(1, 32):
        series[:, t] = 0.95 * series[:, t - 1] + 0.3 * rng.standard_normal(96)
    ids = torch.from_numpy(np.clip(np.rint((series + 4) * 50), 0, 399).astype(np.int64) + 2)
    prompts = ids[:, :16]
    tokens = ids[:, 16:]
    of_p = torch.stack([0.95 * network.values_of(ids[:, 15:-1]), torch.full((96, 16), 0.3)], dim=-1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    curve = []
    for _ in range(40):
        context = network.context(prompts, torch.full((96,), 16), torch.ones(96))
        loss = network.path_loss(network.hidden(context, tokens), tokens, of_p)
        assert loss is not None
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        curve.append(float(loss.detach().mean()))
    assert curve[-1] < curve[0] - 0.5
