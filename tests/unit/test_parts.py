"""Contexts as parts: what is read at the door, what a process refuses in words, and what a reward sees of them."""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.errors import ContextError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.spec import outlook_of
from sdt_dist.models.toy import Toy
from sdt_dist.parts import (
    Context,
    SeriesPart,
    TextPart,
    TokensPart,
    as_context,
    only_part,
)
from sdt_dist.rewards.context import RewardContext

ALL = ("text", "tokens", "series")
TEXT_MODEL = ("text", "tokens")
FORECASTER = ("series",)
HISTORY = np.sin(np.arange(40.0))


def _toy_process() -> TokenProcess:
    model = Toy(5, 4, 1.0)
    return TokenProcess(model, model.law, 4)


@pytest.mark.parametrize("takes", [ALL, TEXT_MODEL, FORECASTER])
def test_what_was_read_once_is_read_as_it_is(takes):
    for given in (
        "a text",
        [1, 2, 3],
        HISTORY,
        (),
        TextPart("x"),
        [TextPart("x"), TokensPart((1,))],
    ):
        context = as_context(given, takes)
        assert as_context(context, takes) == context


@pytest.mark.parametrize(
    ("given", "takes", "form"),
    [
        ("w1 w2", ALL, "text"),
        ([1, 2], ALL, "tokens"),
        (np.array([1, 2]), TEXT_MODEL, "tokens"),
        ([], ALL, "tokens"),
        ([1, 2], FORECASTER, "series"),
        (np.arange(40), FORECASTER, "series"),
        ([0.5, 2.0], ALL, "series"),
        (HISTORY, ALL, "series"),
        (HISTORY, TEXT_MODEL, "series"),
    ],
)
def test_whole_numbers_are_tokens_for_who_takes_tokens_and_values_elsewhere(given, takes, form):
    (part,) = as_context(given, takes)
    assert part.form == form


@pytest.mark.parametrize("given", [{"a": 1}, [["a"], ["b", "c"]], ["one", "two"], object()])
def test_what_is_no_context_is_refused(given):
    with pytest.raises(ContextError, match=r"prompt: .* allowed: a string, token ids, a 1-D array"):
        as_context(given, ALL)


def test_a_process_refuses_the_forms_that_it_does_not_take():
    toy = _toy_process()
    states = outlook_of("bundled").states(4)
    assert toy.takes == ("tokens",) and states.takes == ("series",)
    with pytest.raises(ContextError, match="a text, but this model takes token ids"):
        toy.root("w1")
    with pytest.raises(ContextError, match="a series of numbers, but this model takes token ids"):
        toy.root(HISTORY)
    with pytest.raises(ContextError, match="a text, but this model takes a series"):
        states.root("w1")
    with pytest.raises(ContextError, match="token ids, but this model takes a series"):
        states.root((TokensPart((1, 2)),))
    with pytest.raises(ContextError, match="2 parts, but this model takes one"):
        states.root((TextPart("load"), SeriesPart(HISTORY)))
    assert toy.root((TokensPart((1,)),)).prompt == toy.root([1]).prompt
    assert states.root((SeriesPart(HISTORY),)).prompt == states.root(HISTORY).prompt


def test_only_part_names_every_form_that_is_taken():
    with pytest.raises(ContextError, match="takes a text or token ids; give it that"):
        only_part((SeriesPart(HISTORY),), TEXT_MODEL)


@pytest.mark.parametrize(
    ("context", "history", "prompt"),
    [
        ((SeriesPart(HISTORY),), HISTORY, None),
        ((TextPart("it is "),), None, "it is "),
        ((TokensPart((1, 2)),), None, None),
        ((TextPart("a"), SeriesPart(HISTORY), TextPart("b")), HISTORY, "ab"),
        ((SeriesPart(HISTORY), SeriesPart(HISTORY)), None, None),
    ],
)
def test_a_reward_sees_the_one_series_and_the_texts(
    context: Context, history: np.ndarray | None, prompt: str | None
):
    seen = RewardContext.of(context)
    assert seen.history is history and seen.prompt == prompt
