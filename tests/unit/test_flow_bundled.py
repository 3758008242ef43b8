"""The flow on board: it belongs to the bundled forecaster, and helps on series that it was not trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sdt_dist as sdt
from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.flow.files import BUNDLED, FlowFiles
from sdt_dist.flow.flow import Flow
from sdt_dist.models.card import card_of
from sdt_dist.protocols import Root, prompt_digest
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import parse_reward
from sdt_dist.search.session import SearchProblem
from sdt_dist.training.flow.collect import collect
from sdt_dist.training.flow.config import load_train_config
from sdt_dist.training.flow.contexts import SyntheticContexts
from sdt_dist.training.flow.held_out import divergences

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = BUNDLED.parents[2] / "examples" / "flow_bundled.yaml"
OTHER_SEED = 12_345  # of contexts; training had the recipe's own


def test_it_is_what_its_recipe_says_and_fits_the_bundled_model():
    files = FlowFiles.read("bundled")
    config = load_train_config(str(RECIPE), {})
    head = files.head
    assert (head.info.reward, head.spec.max_new_tokens) == (config.reward, config.horizon)
    assert head.info.inverse_temperatures == config.training().inverse_temperatures
    assert head.info.version == config.rounds and config.seed != OTHER_SEED
    files.check_model(card_of(sdt.load_model("bundled"), "bundled"))
    head.check_use("spectral:gamma=1", 20.0, 48)
    for reward, strength, horizon in (
        ("spectral:gamma=2", 20.0, 48),
        ("spectral:gamma=1", 2.0, 48),
        ("spectral:gamma=1", 20.0, 24),
    ):
        with pytest.raises((CheckpointError, ConfigurationError)):
            head.check_use(reward, strength, horizon)


def test_what_it_says_of_a_state_does_not_depend_on_the_states_beside_it():
    """To the last bit, or a fleet's batches, which timing makes, would change results."""
    flow = Flow.of(FlowFiles.read("bundled"))
    rng = np.random.default_rng(0)
    prompt = tuple(rng.integers(300, 700, 512).tolist())
    root = Root(prompt, prompt_digest(prompt))
    lengths = rng.integers(0, 40, 64)
    states = [(root, tuple(rng.integers(300, 700, length).tolist())) for length in lengths]
    logits = rng.normal(size=(64, flow.spec.vocab_size))
    log_prob = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    alone = []
    for state, row in zip(states, log_prob, strict=True):
        flow.forget()
        alone.append(flow.log_tilts([state], 20.0, row[None])[0])
    for size in (3, 17, 40, 64):
        chosen = rng.permutation(64)[:size]
        flow.forget()
        together = flow.log_tilts([states[i] for i in chosen], 20.0, log_prob[chosen])
        assert np.array_equal(together, np.stack([alone[i] for i in chosen]))


def test_its_proposal_is_nearer_to_the_target_than_p_on_series_that_it_never_saw():
    process = sdt.load_model("bundled").process(48)
    flow = Flow.of(FlowFiles.read("bundled"))
    factory = parse_reward("spectral:gamma=1")
    contexts = SyntheticContexts(512).draw(OTHER_SEED, 0, 5)
    problems = [
        SearchProblem(i, process.root(context), factory.build(RewardContext.of(context)))
        for i, context in enumerate(contexts)
    ]
    options = {"inverse_temperature": 10.0, "num_rollouts": 40}
    found = collect(process, problems, "snis", options, seed=0, num_children=24, ordered=True)
    assert not found.errors and len(found.rewards) == 5
    with torch.no_grad():
        at = divergences(flow.network, found.trajectories, 10.0)
    assert 0 < at["flow"] < 0.95 * at["prior"]
