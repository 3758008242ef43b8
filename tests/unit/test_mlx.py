"""The mlx backend against Transformers and hf, its loading, and that it stays out of the way where it is not wanted."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import sdt_dist as sdt
from sdt_dist.errors import CheckpointError, ConfigurationError, ContextError, MissingExtraError
from sdt_dist.models.card import card_of, process_of
from sdt_dist.models.loading import load_model
from sdt_dist.models.spec import check_spec
from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest, Root, prompt_digest
from tests.conformance.conftest import BACKENDS

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
WORDS = ["<unk>", "<s>", "<end>", *(f"w{i}" for i in range(29))]


def saved(folder: Path, module: torch.nn.Module) -> str:
    """A model directory with a tokenizer, as a user would have it."""
    module.save_pretrained(folder)  # type: ignore[operator]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    return str(folder)


def llama(rope: dict[str, object] | None = None, hidden: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, eos_token_id=2,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def root_of(*prompt: int) -> Root:
    return Root(prompt, prompt_digest(prompt))


def deviation(module: torch.nn.Module, model, tokens: list[int]) -> float:
    """Largest difference of log p between a Transformers module and what a backend's expansions say, over prefixes."""
    with torch.inference_mode():
        want = torch.log_softmax(
            module(input_ids=torch.tensor([tokens])).logits[0].double(), -1
        ).numpy()
    root = root_of(*tokens[:4])
    law = PriorLaw((0, model.vocab_size))
    asked = [
        ExpandRequest(root, tuple(tokens[4:end]), model.vocab_size)
        for end in range(4, len(tokens) + 1)
    ]
    worst = 0.0
    for end, reply in enumerate(model.expand(asked, law), start=4):
        worst = max(worst, float(np.abs(reply.log_prob - want[end - 1, reply.children]).max()))
    return worst


TOKENS = np.random.default_rng(0).integers(3, 32, 40).tolist()


@pytest.mark.mlx
@pytest.mark.parametrize("rope", [None, {"rope_type": "default", "rope_theta": 500000.0}, LLAMA3])
def test_scores_agree_with_transformers_at_any_rotary_setting(tmp_path, rope):
    module = llama(rope)
    loaded = load_model(f"mlx:{saved(tmp_path, module)}")
    assert deviation(module, loaded.model, TOKENS) < 1e-4
    logits = loaded.get_next_token_logits(TOKENS)
    with torch.inference_mode():
        want = module(input_ids=torch.tensor([TOKENS])).logits[0, -1].numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.mlx
def test_without_its_rotary_base_a_model_would_score_wrongly(tmp_path):
    """What the explicit rope_theta is for: mlx-lm alone is far off, and says nothing."""
    from mlx_lm.utils import load_model as plain_load

    from sdt_dist.models.mlx.model import MlxModel

    module = llama({"rope_type": "default", "rope_theta": 500000.0})
    saved(tmp_path, module)
    wrong, config = plain_load(tmp_path)  # type: ignore[misc]
    assert deviation(module, MlxModel(wrong, config), TOKENS) > 0.1


@pytest.mark.mlx
def test_rotary_settings_that_do_not_arrive_are_refused(tmp_path):
    directory = saved(tmp_path, llama())
    config = json.loads((tmp_path / "config.json").read_text())
    layered = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": layered}))
    with pytest.raises(ConfigurationError, match="rope_parameters"):
        load_model(f"mlx:{directory}")


@pytest.mark.mlx
def test_another_architecture_agrees_too_as_far_as_its_window(tmp_path):
    """mlx-lm runs Mistral without its sliding window: beyond that the scores would differ, so that is the limit."""
    torch.manual_seed(2)
    config = MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=20, eos_token_id=2,
    )  # fmt: skip
    module = MistralForCausalLM(config).eval()
    model = load_model(f"mlx:{saved(tmp_path, module)}").model
    assert deviation(module, model, TOKENS[:19]) < 1e-4
    with pytest.raises(ContextError, match="context of 20"):
        deviation(module, model, TOKENS[:21])


@pytest.mark.mlx
def test_layers_without_plain_caches_are_fed_again_and_score_the_same(tmp_path):
    """A sliding window in one layer: nothing is handed on, prompts of several lengths still share a batch."""
    from sdt_dist.models.mlx.loading import load_module
    from sdt_dist.models.mlx.model import MlxModel

    saved(tmp_path, llama())
    config = json.loads((tmp_path / "config.json").read_text())
    windowed = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps({**config, **windowed}))
    model = MlxModel(*load_module(tmp_path))
    law = PriorLaw((3, 32))
    roots = [root_of(*TOKENS[:length]) for length in (3, 7, 12)]
    asked = [
        RolloutRequest(root, tuple(TOKENS[20 : 20 + i]), 9 - 2 * i, i)
        for i, root in enumerate(roots)
    ]
    for request, reply in zip(asked, model.rollout(asked, law), strict=True):
        sequence = [*request.root.prompt, *request.tokens]
        for token, log_prob in zip(reply.tokens.tolist(), reply.log_prob.tolist(), strict=True):
            row = model.reference_logits(sequence)[3:].astype(np.float64)
            assert log_prob == pytest.approx(row[token - 3] - np.logaddexp.reduce(row), abs=1e-4)
            sequence.append(token)
    assert model._cache.size_bytes == 0
    # of the three states, only the last has a token before its last one
    assert model.recomputed_tokens == 1


@pytest.mark.mlx
def test_counters_are_those_of_hf():
    """The same requests cost the same on both backends, evictions included."""
    plain = BACKENDS["hf-llama-gqa"]()
    ours = BACKENDS["mlx-llama"]()
    for budget in (1 << 30, 1):
        models = [backend.make(cache_bytes=budget) for backend in (plain, ours)]
        for model in models:
            for number in range(3):
                model.rollout([RolloutRequest(plain.root(number), (), 8, 5)], PriorLaw((4, 24)))
                model.expand(
                    [ExpandRequest(plain.root(number), (4, 5, 6)[:depth], 2) for depth in range(4)],
                    plain.law,
                )
        counters = [(model.nfe, model.model_calls, model.recomputed_tokens) for model in models]
        assert counters[0] == counters[1]
    assert counters[1][2] > 0


@pytest.mark.mlx
def test_a_small_byte_budget_evicts_and_changes_no_score():
    backend = BACKENDS["mlx-llama"]()
    roomy = backend.make()
    tight = backend.make(cache_bytes=3000)
    law = PriorLaw((4, 24))
    asked = []
    for number in range(3):
        (reply,) = roomy.rollout([RolloutRequest(backend.root(number), (), 12, 9)], law)
        tight.rollout([RolloutRequest(backend.root(number), (), 12, 9)], law)
        asked += [
            ExpandRequest(backend.root(number), tuple(reply.tokens[:depth].tolist()), 24)
            for depth in (11, 5)
        ]
    for want, have in zip(roomy.expand(asked, law), tight.expand(asked, law), strict=True):
        np.testing.assert_allclose(want.log_prob, have.log_prob, atol=1e-4)
    assert roomy.recomputed_tokens == 0 < tight.recomputed_tokens
    assert tight._cache.size_bytes <= 3000
    for number in range(3):
        roomy.release(backend.root(number))
    assert roomy._cache.size_bytes == 0


@pytest.mark.mlx
def test_two_cached_prefixes_meet_the_same_suffix_in_one_call():
    """Both prefixes were computed before, with prompts of different lengths; the suffix reuses each one's own KV."""
    model = BACKENDS["mlx-llama"]().make()
    plain = BACKENDS["hf-llama-gqa"]().make()
    law = PriorLaw((4, 24))
    roots = [root_of(5, 6, 7), root_of(9, 8, 7, 6, 5, 4)]
    suffix = (10, 11, 12, 13)
    for root in roots:
        model.expand([ExpandRequest(root, suffix, 1)], law)
    before = model.nfe
    asked = [ExpandRequest(root, (*suffix, 14), 20) for root in roots]
    replies = model.expand(asked, law)
    want = plain.expand(asked, law)
    assert model.nfe == before + 2
    assert model.recomputed_tokens == plain.recomputed_tokens - 2 * len(suffix) + 2 * (
        len(suffix) - 1
    )
    for have, other in zip(replies, want, strict=True):
        order = np.argsort(have.children)
        places = np.argsort(other.children)
        np.testing.assert_allclose(have.log_prob[order], other.log_prob[places], atol=1e-4)
    assert np.abs(replies[0].log_prob - replies[1].log_prob).max() > 1e-2


@pytest.mark.mlx
def test_a_long_prompt_goes_in_pieces_and_counts_once(tmp_path, monkeypatch):
    from sdt_dist.models.mlx import decoder

    monkeypatch.setattr(decoder, "_PIECE_TOKENS", 16)
    module = llama()
    model = load_model(f"mlx:{saved(tmp_path, module)}").model
    law = PriorLaw((0, 32))
    root = root_of(*TOKENS)
    (reply,) = model.expand([ExpandRequest(root, (), 32)], law)
    with torch.inference_mode():
        want = torch.log_softmax(
            module(input_ids=torch.tensor([TOKENS])).logits[0, -1].double(), -1
        ).numpy()
    np.testing.assert_allclose(reply.log_prob, want[reply.children], atol=1e-4)
    assert (model.nfe, model.model_calls) == (1, 1)


@pytest.mark.mlx
def test_four_bit_models_agree_with_their_own_weights_unpacked(tmp_path):
    from mlx_lm import convert

    module = llama({"rope_type": "default", "rope_theta": 500000.0}, hidden=128)
    saved(tmp_path / "full", module)
    convert(
        str(tmp_path / "full"), str(tmp_path / "four"), quantize=True, q_bits=4, q_group_size=32
    )
    convert(str(tmp_path / "four"), str(tmp_path / "unpacked"), dequantize=True)
    model = load_model(f"mlx:{tmp_path / 'four'}").model
    packed = sum(
        weight.nbytes for name, weight in model.named_weights() if ".q_proj.weight" in name
    )
    assert packed == 2 * 128 * 128 // 2
    assert deviation(module, model, TOKENS) > 1e-2
    module.load_state_dict(load_file(tmp_path / "unpacked" / "model.safetensors"))
    assert deviation(module, model, TOKENS) < 1e-3


@pytest.mark.mlx
def test_language_models_end_and_mask_as_with_hf(tmp_path):
    directory = saved(tmp_path, llama())
    ours = load_model(f"mlx:{directory}")
    plain = load_model(directory)
    assert ours.law() == plain.law()
    assert ours.encode_text("w3") == plain.encode_text("w3")
    assert [token for token, _ in ours.get_top_k_tokens(TOKENS, 5)] == [
        t for t, _ in plain.get_top_k_tokens(TOKENS, 5)
    ]
    assert ours.model.max_context == plain.model.max_context == 64
    ours_card = card_of(ours)
    plain_card = card_of(plain)
    assert (ours_card.spec, ours_card.kind, ours_card.vocab_size) == (
        plain_card.spec,
        plain_card.kind,
        plain_card.vocab_size,
    )
    assert not ours_card.deterministic
    assert (
        card_of(load_model(f"mlx:{directory}")).identity
        == ours_card.identity
        != plain_card.identity
    )
    assert process_of(ours_card, ours.model, 4).law == plain.law()


@pytest.fixture(scope="module")
def history() -> np.ndarray:
    steps = np.arange(400)
    return 20 + 5 * np.sin(steps / 4) + np.random.default_rng(0).normal(size=400)


@pytest.mark.mlx
def test_the_bundled_forecaster_scores_as_with_hf(history):
    processes = [load_model(spec).process(24) for spec in ("bundled", "mlx:bundled")]
    root = processes[0].root(history)
    (drawn,) = processes[0].rollout([RolloutRequest(root, (), 24, 3)])
    states = [tuple(drawn.tokens[:depth].tolist()) for depth in range(0, 24, 3)]
    for state in states:
        want, have = (p.expand([ExpandRequest(root, state, 1022)])[0] for p in processes)
        scores = [np.full(1024, -np.inf), np.full(1024, -np.inf)]
        for row, reply in zip(scores, (want, have), strict=True):
            row[reply.children] = reply.log_prob
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


@pytest.mark.mlx
def test_searches_run_on_it_and_say_that_only_seeds_are_promised(history):
    def rough(series: list[np.ndarray]) -> list[float]:
        return [-float(np.abs(np.diff(one)).mean()) for one in series]

    options = {
        "num_rollouts": 24,
        "max_new_tokens": 12,
        "inverse_temperature": 2.0,
        "num_samples": 4,
        "seed": 0,
    }
    for method in ("snis", "residual_ts"):
        ours, plain = (
            sdt.search(load_model(spec), history, rough, method=method, **options)
            for spec in ("mlx:bundled", "bundled")
        )
        assert ours.log_z == pytest.approx(plain.log_z, abs=0.5)
        assert ours.best.reward >= min(sample.reward for sample in ours.samples)
        assert ours.rollouts == plain.rollouts == 24
    assert not load_model("mlx:bundled").process(12).deterministic


@pytest.mark.mlx
def test_bad_models_are_named(tmp_path):
    directory = saved(tmp_path / "good", llama())
    with pytest.raises(ConfigurationError, match="does not exist"):
        check_spec("mlx:./nowhere")
    with pytest.raises(ConfigurationError, match="chooses its own"):
        load_model(f"mlx:{directory}", device="cpu")
    with pytest.raises(ConfigurationError, match="never runs code"):
        load_model(f"mlx:{directory}", trust_remote_code=True)

    def changed(name: str, **values: object) -> str:
        folder = tmp_path / name
        shutil.copytree(directory, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        return f"mlx:{folder}"

    with pytest.raises(ConfigurationError, match="not supported"):
        load_model(changed("foreign", model_type="no_such_model"))
    with pytest.raises(ConfigurationError, match="custom module"):
        load_model(changed("code", model_file="code.py"))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(changed("deeper", num_hidden_layers=3))
    pickled = changed("pickled").removeprefix("mlx:")
    (Path(pickled) / "model.safetensors").rename(Path(pickled) / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(f"mlx:{pickled}")
    damaged = changed("damaged").removeprefix("mlx:")
    weights = Path(damaged) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(f"mlx:{damaged}")


@pytest.mark.mlx
def test_loading_leaves_the_limit_on_open_files_alone():
    code = (
        "import resource; before = resource.getrlimit(resource.RLIMIT_NOFILE); import sdt_dist.models.mlx.loading; "
        "after = resource.getrlimit(resource.RLIMIT_NOFILE); print(after[0] == min(before[0], after[1]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0


def test_nothing_imports_mlx_before_it_is_asked_for():
    code = (
        "import sys, sdt_dist, sdt_dist.models.loading as loading; loading.load_model('bundled'); "
        "print([name for name in ('mlx', 'mlx_lm') if sys.modules.get(name)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sdt-dist\[mlx\]'"):
        check_spec("mlx:bundled")
    with pytest.raises(MissingExtraError, match=r"pip install 'sdt-dist\[mlx\]'"):
        load_model("mlx:bundled")
