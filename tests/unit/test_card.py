"""Model cards: the process of a remote model is the loaded model's own, without torch and transformers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.models.card import ModelCard, ServedModel, card_of, process_of, states_of
from sdt_dist.models.forecaster.process import Forecaster
from sdt_dist.models.forecaster.spec import ForecasterSpec
from sdt_dist.models.hf.model import HFModel
from sdt_dist.models.language import LanguageModel
from sdt_dist.models.text import TextCodec
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import RolloutRequest

SMALL = ForecasterSpec(64, 24, 64, hidden_size=16, intermediate_size=24, num_layers=1, head_dim=8)
HISTORY = np.sin(np.arange(60) / 3.0) * 7 + 100
WORDS = ["<unk>", "<s>", "<end>", "the", "capital", "of", "France", "is", "Paris", "."]


def forecaster() -> Forecaster:
    import torch

    torch.manual_seed(0)
    return Forecaster(HFModel(SMALL.build().eval()), SMALL)


def language() -> LanguageModel:
    import torch

    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<end>"
    )
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=2,
    )  # fmt: skip
    return LanguageModel(HFModel(LlamaForCausalLM(config).eval()), fast)


@pytest.mark.parametrize("make", [forecaster, language, lambda: Toy(5, 6, 1.0)])
def test_a_card_is_json_and_the_same_for_the_same_model(make):
    card = card_of(make(), "some name")
    assert ModelCard.from_json(card.to_json()) == card
    assert card == card_of(make(), "some name")
    assert card.name == "some name"
    assert len(bytes.fromhex(card.identity)) == 16


def test_identity_follows_the_weights_and_what_else_defines_the_model():
    model = forecaster()
    first = card_of(model).identity
    assert card_of(Forecaster(model.model, replace(SMALL, limit=9.0))).identity != first
    model.model.module.get_parameter("model.norm.weight").data[0] += 1e-6
    assert card_of(model).identity != first
    assert card_of(Toy(5, 6, 1.0)).identity != card_of(Toy(5, 6, 1.0, seed=1)).identity


def test_a_forecaster_process_from_a_card_is_the_models_own():
    model = forecaster()
    own = model.process(12, sampling_temperature=0.7, top_k=9)
    other = process_of(card_of(model), model.model, 12, sampling_temperature=0.7, top_k=9)
    assert other.law == own.law and other.max_new_tokens == own.max_new_tokens
    root = own.root(HISTORY)
    same = other.root(HISTORY)
    assert (root.prompt, root.digest, root.meta) == (same.prompt, same.digest, same.meta)
    (reply,) = other.rollout([RolloutRequest(same, (), 12, 4)])
    tokens = tuple(reply.tokens.tolist())
    np.testing.assert_array_equal(
        other.decode(same, [tokens])[0].series, own.decode(root, [tokens])[0].series
    )
    with pytest.raises(ConfigurationError, match="horizon"):
        process_of(card_of(model), model.model, SMALL.max_horizon + 1)


def test_forecaster_states_need_no_model():
    model = forecaster()
    card = ModelCard.from_json(card_of(model).to_json())
    own = model.process(12, top_k=9)
    states = states_of(card, card, 12, top_k=9)
    assert (states.law, states.max_new_tokens, states.top_k) == (own.law, 12, 9)
    root = states.root(HISTORY)
    assert (root.prompt, root.meta) == (own.root(HISTORY).prompt, own.root(HISTORY).meta)
    tokens = tuple(range(9, 21))
    assert not states.is_finished(tokens[:-1]) and states.is_finished(tokens)
    assert states.finish_reason(tokens) == own.finish_reason(tokens) == "length"
    (answer,) = states.decode(root, [tokens])
    np.testing.assert_array_equal(answer.series, own.decode(root, [tokens])[0].series)


def test_language_states_from_a_card_alone_read_and_write_the_same_text():
    model = language()
    card = ModelCard.from_json(card_of(model).to_json())
    own = model.process(6)
    other = pickle.loads(pickle.dumps(states_of(card, card, 6)))
    assert other.max_new_tokens == own.max_new_tokens and other.top_k == own.top_k
    assert other.deterministic == own.deterministic
    assert other.law == own.law
    for prompt in ("the capital of France is", "Paris the <end> nonsense ."):
        assert other.root(prompt).prompt == own.root(prompt).prompt
    answer = (3, 8, 2)
    assert other.decode(own.root("the"), [answer]) == own.decode(own.root("the"), [answer])


def test_a_codec_cleans_up_as_its_tokenizer_does():
    words = {word: i for i, word in enumerate(["[UNK]", "it", "'", "s", "fine", ".", "!"])}
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    for clean_up in (True, False):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=clean_up
        )
        codec = TextCodec.of(fast)
        assert codec.clean_up is clean_up
        for ids in ([1, 2, 3, 4, 5], [4, 6, 5], []):
            assert codec.decode(ids) == fast.decode(ids, skip_special_tokens=True)


def test_a_tokens_process_from_a_card():
    toy = Toy(5, 6, 1.0)
    process = process_of(card_of(toy), toy, 6, top_k=3)
    assert process.law.allowed == (0, 5) and process.law.top_k == 3
    assert process.decode(process.root([2]), [(1, 2)])[0].tokens == (1, 2)


def test_served_models_pass_their_card_on():
    toy = Toy(5, 6, 1.0)
    served = ServedModel(card_of(toy, "toy"), toy)
    assert card_of(served) is served.card
    assert served.sample_view == "tokens"
    assert served.process(6).max_new_tokens == 6


def test_searching_from_a_card_imports_no_torch():
    script = f"""
import sys, numpy as np
from sdt_dist.models.card import ModelCard, process_of
from sdt_dist.models.remote import wire
class Remote:
    vocab_size, max_context, deterministic, nfe, model_calls = {SMALL.vocab_size}, {SMALL.max_length}, True, 0, 0
for text in {[card_of(forecaster()).to_json(), card_of(Toy(5, 6, 1.0)).to_json()]!r}:
    card = ModelCard.from_json(text)
    process = process_of(card, Remote(), 6)
    history = np.sin(np.arange(40.0)) if card.kind == "forecaster" else [1]
    root = process.root(history)
    process.decode(root, [(2, 3)])
bad = sorted(name for name in ("torch", "transformers", "ray", "aiohttp") if name in sys.modules)
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "picture"}, "kind"),
        ({"vocab_size": "5"}, "vocab_size"),
        ({"deterministic": 1}, "deterministic"),
        ({"surprise": 1}, "fields"),
        ({"spec": []}, "spec"),
    ],
)
def test_a_malformed_card_is_refused(change, named):
    values = {**asdict(card_of(Toy(5, 6, 1.0))), **change}
    with pytest.raises(ConfigurationError, match=named):
        ModelCard.from_json(json.dumps(values))


def test_cards_that_describe_no_process_are_refused():
    card = card_of(Toy(5, 6, 1.0))
    toy = Toy(5, 6, 1.0)
    with pytest.raises(ConfigurationError, match="definition of p"):
        process_of(replace(card, spec={"allowed": 3}), toy, 6)
    with pytest.raises(CheckpointError, match="model card"):
        process_of(replace(card, kind="forecaster", spec={"vocab_size": 3}), toy, 6)
    with pytest.raises(ConfigurationError, match="tokenizer"):
        process_of(
            replace(card, kind="language", spec={**card.spec, "tokenizer": {"tokenizer": "{"}}),
            toy,
            6,
        )
    with pytest.raises(ConfigurationError, match="not JSON"):
        ModelCard.from_json("{")


def test_what_has_no_law_or_no_name_is_refused():
    with pytest.raises(ConfigurationError, match="law"):
        card_of(forecaster().model)

    class Nameless(Toy):
        log_prob_tables = None

        def __init__(self) -> None:
            self.vocab_size = 5
            self.max_context = 7

    with pytest.raises(ConfigurationError, match="identity"):
        card_of(Nameless())
    named = Nameless()
    named.identity = "mine"
    assert len(card_of(named).identity) == 32
