"""Tree states and model states: what is translated on the way to the model and back."""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.noise import position_key
from sdt_dist.protocols import ExpandRequest, RolloutRequest
from sdt_dist.search.blocks import BlockStates, block_ends
from sdt_dist.search.states import PlainStates, model_tokens
from tests.search_helpers import PARAMETERS


def _process() -> TokenProcess:
    model = Toy(*PARAMETERS["C"])
    return TokenProcess(model, model.law, model.length)


def _draw(process: TokenProcess, states, tokens: tuple[int, ...], num_tokens: int, key: int):
    """A draw below a tree state: what the model replied, and that in the units of the tree."""
    request = RolloutRequest(process.root([0]), tokens, num_tokens, key)
    (reply,) = process.rollout([states.to_model(request)])
    return reply, states.to_tree(request, reply)


def test_plain_states_are_the_models_and_nothing_is_translated():
    process = _process()
    states = PlainStates(process)
    for request in (
        ExpandRequest(process.root([0]), (1,), 2),
        RolloutRequest(process.root([0]), (1,), 2, 3),
    ):
        assert states.to_model(request) is request
    reply, same = _draw(process, states, (1,), 2, 3)
    assert same is reply and states.blocks == []
    assert states.max_new_tokens == process.max_new_tokens
    for tokens in ((), (1,), (1, 2, 3, 4, 0, 1)):
        assert states.is_finished(tokens) == process.is_finished(tokens)
        assert states.finish_reason(tokens) == process.finish_reason(tokens)


@pytest.mark.parametrize("block_size", [1, 2, 4, 6])
def test_blocks_say_the_same_tokens_with_the_same_probability(block_size):
    process = _process()
    plain = PlainStates(process)
    ends = block_ends(process.max_new_tokens, block_size, None)
    states = BlockStates(process, ends)
    whole, reply = _draw(process, states, (), len(ends), 7)
    own, _ = _draw(process, plain, (), process.max_new_tokens, 7)
    ids = tuple(reply.tokens.tolist())
    np.testing.assert_array_equal(whole.tokens, own.tokens)
    assert model_tokens(ids, states.blocks) == tuple(own.tokens.tolist())
    assert [len(states.blocks[i]) for i in ids] == np.diff([0, *ends]).tolist()
    assert reply.log_prob.sum() == pytest.approx(own.log_prob.sum(), rel=1e-12)
    assert reply.cost == whole.cost and states.is_finished(ids)
    assert states.decode(process.root([0]), [ids]) == process.decode(
        process.root([0]), [tuple(own.tokens.tolist())]
    )


def test_a_draw_below_a_block_has_the_noise_of_its_token():
    """The tree keys a draw by its depth in blocks, the model by its depth in tokens."""
    process = _process()
    states = BlockStates(process, [2, 4, 6], [(1, 3)])
    key = position_key(11, 1)
    request = states.to_model(RolloutRequest(process.root([0]), (0,), 1, key))
    assert (request.tokens, request.num_tokens) == ((1, 3), 2)
    assert request.key == position_key(11, 2)


def test_blocks_that_are_known_keep_their_ids():
    process = _process()
    first = BlockStates(process, [3, 6])
    _, reply = _draw(process, first, (), 2, 5)
    second = BlockStates(process, [3, 6], first.blocks)
    _, again = _draw(process, second, (), 2, 5)
    np.testing.assert_array_equal(again.tokens, reply.tokens)
    assert second.blocks == first.blocks
