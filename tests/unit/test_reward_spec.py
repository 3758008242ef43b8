"""REWARD SPEC, user files, text rewards and reward models: what is built, and what is refused before a model runs."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from sdt_dist.errors import CheckpointError, ConfigurationError, ContextError, RewardError
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.forecast import Bounds, DtwTemplate, Smoothness, Total
from sdt_dist.rewards.spec import parse_reward, reward_identity, with_gamma
from sdt_dist.rewards.spectral import SpectralReward
from sdt_dist.rewards.text import Answer, Length, Regex, RewardModel
from tests.reward_helpers import HISTORY, SERIES, decoded, texts


def test_rewards_see_the_history_or_the_prompt_and_nothing_else(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def spy(series, context):\n    return [context.history.sum()] * len(series)\n")
    reward = parse_reward(f"{file}:spy").build(RewardContext(history=HISTORY))
    assert reward.score(decoded(SERIES)).tolist() == [HISTORY.sum()] * len(SERIES)
    assert {field.name for field in fields(RewardContext)} == {"history", "prompt"}


SPECS = {
    "spectral:gamma=1+nonneg": lambda h: SpectralReward(h, 1.0) + Bounds(h, low=0.0),
    "spectral:gamma=1+0.5*nonneg": lambda h: SpectralReward(h, 1.0) + 0.5 * Bounds(h, low=0.0),
    "spectral:gamma=2,distance=kl,segment=8": lambda h: SpectralReward(h, 2.0, "kl", 8),
    "2*spectral:distance=wasserstein + dtw": lambda h: (
        2.0 * SpectralReward(h, 1.0, "wasserstein") + DtwTemplate(h)
    ),
    "bounds:low=0,high=80": lambda h: Bounds(h, 0.0, 80.0),
    "bounds:low=-1,hard=false": lambda h: Bounds(h, low=-1.0),
    "bounds:low=-1,high=1,hard=true,floor=-5": lambda h: Bounds(h, -1.0, 1.0, True, -5.0),
    "nonneg:hard=true,floor=-7": lambda h: Bounds(h, low=0.0, hard=True, floor=-7.0),
    "total:value=1e+2": lambda h: Total(h, 100.0),
    "1e+2*nonneg+1E-1*dtw": lambda h: 100.0 * Bounds(h, low=0.0) + 0.1 * DtwTemplate(h),
    "-1*smoothness": lambda h: -1.0 * Smoothness(h),
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_the_reward_it_writes_down(spec):
    factory = parse_reward(spec)
    want = SPECS[spec](HISTORY)
    have = factory.build(RewardContext(history=HISTORY))
    assert factory.view == "series"
    assert have.multipliers == want.multipliers
    np.testing.assert_array_equal(have.score(decoded(SERIES)), want.score(decoded(SERIES)))


@pytest.mark.parametrize(
    ("spec", "gamma", "want"),
    [
        ("spectral:gamma=1", 2.0, "spectral:gamma=2"),
        ("spectral", 0.5, "spectral:gamma=0.5"),
        (
            "2*spectral:distance=kl, gamma=3 + nonneg",
            1e-7,
            "2*spectral:gamma=1e-07,distance=kl+nonneg",
        ),
        (
            "0.1*spectral+spectral:distance=wasserstein",
            4.0,
            "0.1*spectral:gamma=4+spectral:gamma=4,distance=wasserstein",
        ),
        ("1e+2*spectral", 1e20, "1e+2*spectral:gamma=1e+20"),
        ("spectral + nonneg", 1.0, "spectral + nonneg"),
        ("spectral:gamma=2", 2.0, "spectral:gamma=2"),
    ],
)
def test_another_gamma_weighs_the_spectral_terms_and_changes_nothing_else(spec, gamma, want):
    changed = with_gamma(spec, gamma)
    assert changed == want and with_gamma(changed, gamma) == changed
    assert reward_identity(changed) == reward_identity(spec)
    have, before = (parse_reward(s).build(RewardContext(history=HISTORY)) for s in (changed, spec))
    raw = have.components(decoded(SERIES))
    old = before.components(decoded(SERIES))
    assert raw.keys() == old.keys() and all((raw[name] == old[name]).all() for name in raw)
    ratios = {n: m / before.multipliers[n] for n, m in have.multipliers.items()}
    first = next(name for name in ratios if name.startswith("spectral"))
    assert {n: r for n, r in ratios.items() if n.startswith("spectral")} == pytest.approx(
        {n: ratios[first] for n in ratios if n.startswith("spectral")}
    )
    assert all(r == 1 for n, r in ratios.items() if not n.startswith("spectral"))


@pytest.mark.parametrize(
    ("spec", "gamma", "words"),
    [
        ("nonneg+smoothness", 2.0, ["gamma: 2.0", "'nonneg+smoothness'", "no spectral term"]),
        ("regex:spectral", 2.0, ["no spectral term"]),
        ("own.py:spectral", 2.0, ["no spectral term"]),
        ("spectral:gamma=1+spectral:gamma=2,distance=kl", 3.0, ["[1.0, 2.0]", "as factors"]),
        ("spectral", -1.0, ["gamma=-1", ">= 0"]),
        ("spectral:gama=1", 2.0, ["gama=1"]),
    ],
)
def test_a_gamma_that_a_reward_cannot_take_is_refused(spec, gamma, words):
    with pytest.raises(ConfigurationError) as error:
        with_gamma(spec, gamma)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("specral:gamma=1", ["specral", "Did you mean 'spectral'"]),
        ("nonneg+0.5*smothness", ["smothness", "Did you mean 'smoothness'"]),
        ("spectral:gama=2", ["spectral", "gama=2", "gamma, distance, segment"]),
        ("spectral:gamma", ["spectral", "'gamma'", "allowed"]),
        ("smoothness:x=1", ["smoothness", "x=1", "none"]),
        ("total", ["total", "'value' is missing"]),
        ("length", ["length", "'target' is missing"]),
        ("bounds:low=3,high=1", ["bounds", "low=3.0", "high=1.0", "low < high"]),
        ("bounds:hard=true,floor=-inf", ["bounds", "floor=-inf", "finite"]),
        ("spectral:distance=dtw", ["spectral", "distance=dtw", "log_l1, wasserstein, kl"]),
        ("bounds:low=abc", ["bounds", "low=abc", "a finite number"]),
        ("bounds:low=3,low=4", ["bounds", "'low'", "twice"]),
        ("bounds:hard=maybe", ["bounds", "hard=maybe", "true or false"]),
        ("spectral:gamma=abc", ["spectral", "gamma=abc", "a finite number"]),
        ("spectral:gamma=inf", ["spectral", "gamma=inf", "a finite number"]),
        ("spectral:segment=abc", ["spectral", "segment=abc", "a whole number"]),
        ("spectral:segment=inf", ["spectral", "segment=inf", "a whole number"]),
        ("spectral:segment=10.5", ["spectral", "segment=10.5", "a whole number"]),
        ("length:target=abc", ["length", "target=abc", "a finite number"]),
        ("total:value=abc", ["total", "value=abc", "a finite number"]),
        ("total:value=nan", ["total", "value=nan", "a finite number"]),
        ("e*nonneg", ["nonneg", "factor=e", "a finite number"]),
        ("1..5*nonneg", ["nonneg", "factor=1..5", "a finite number"]),
        ("nonneg+1e999*nonneg", ["nonneg", "factor=1e999", "a finite number"]),
        ("1e*spectral", ["spectral", "factor=1e", "a finite number"]),
        ("nonneg+regex:a", ["regex", "stands alone", "path.py:function"]),
        ("2*answer:yes", ["answer", "stands alone"]),
        ("nonneg+mine.py:f", ["nonneg+mine.py", "does not exist", "stands alone"]),
        ("mine.py:f+nonneg", ["'mine.py:f'", "path.py:function alone"]),
        ("regex:", ["regex", "nothing follows"]),
        ("spectral:gamma=-1", ["gamma", "-1.0", ">= 0"]),
        ("spectral:segment=2", ["segment", "2", ">= 4"]),
        ("length:target=0", ["length", "target=0", "> 0"]),
        ("length:target=5+nonneg", ["mixes text and forecast"]),
        ("crps", ["CRPS", "true future", "no reward may see", "metric"]),
        ("nonneg+0.5*crps:x=1", ["CRPS", "true future"]),
        ("nonneg-spectral", ["nonneg-spectral", "allowed"]),
        ("", ["term ''", "allowed"]),
        ("regex:(", ["regex", "'('", "not a valid pattern"]),
        ("nowhere/mine.py:f", ["nowhere/mine.py", "does not exist"]),
    ],
)
def test_a_wrong_spec_names_the_term_what_is_wrong_and_what_is_allowed(spec, words):
    with pytest.raises(ConfigurationError) as error:
        parse_reward(spec)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpectralReward(HISTORY, np.inf),
        lambda: SpectralReward(HISTORY, np.nan),
        lambda: SpectralReward(HISTORY, segment=10.5),
        lambda: Bounds(HISTORY, np.nan),
        lambda: Total(HISTORY, np.nan),
        lambda: Length(np.inf),
    ],
)
def test_python_callers_get_the_same_checks(make):
    with pytest.raises(ConfigurationError):
        make()


@pytest.mark.parametrize(
    ("spec", "forecasts", "text"),
    [("spectral+nonneg", True, False), ("length:target=5", False, True), ("regex:a", False, True)],
)
def test_a_factory_says_what_it_scores_before_a_model_runs(spec, forecasts, text):
    factory = parse_reward(spec)
    assert (factory.scores_forecasts, factory.scores_text) == (forecasts, text)


@pytest.mark.parametrize(
    ("spec", "shortest"),
    [("nonneg", 1), ("smoothness", 1), ("spectral", 4), ("nonneg+2*spectral:segment=16", 16)],
)
def test_a_horizon_without_a_spectrum_is_refused_before_a_model_runs(spec, shortest):
    factory = parse_reward(spec)
    reward = factory.build(RewardContext(history=HISTORY))
    factory.check_horizon(shortest)
    assert np.isfinite(reward.score(decoded(SERIES[:, :shortest]))).all()
    with pytest.raises(ContextError, match=f"horizon {shortest - 1}, must be >= {shortest}"):
        factory.check_horizon(shortest - 1)
    if shortest > 1:
        with pytest.raises(
            ContextError, match=f"spectral: horizon {shortest - 1}, must be >= {shortest}"
        ):
            reward.score(decoded(SERIES[:, : shortest - 1]))


def test_a_forecast_term_needs_a_history():
    with pytest.raises(ConfigurationError, match=r"nonneg.*no history"):
        parse_reward("nonneg").build(RewardContext(prompt="text"))


@pytest.mark.parametrize(
    ("context", "samples"), [(HISTORY, decoded(SERIES)), (None, texts("", "a", "abc"))]
)
def test_a_users_function_sees_what_the_model_makes(tmp_path, context, samples):
    file = tmp_path / "mine.py"
    file.write_text(
        "def size(batch):\n    return [len(sample) for sample in batch]\n\nsize_s = 3\n"
    )
    factory = parse_reward(f"{file}:size")
    assert factory.view == "any"
    have = factory.build(RewardContext(history=context)).score(samples)
    assert have.tolist() == [len(s.tokens) if context is None else len(s.series) for s in samples]
    for missing in ("length", "size_s"):
        with pytest.raises(ConfigurationError, match=f"no function '{missing}'"):
            parse_reward(f"{file}:{missing}")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("x = 1\ndef f(batch:\n", 2, "SyntaxError"),
        (
            "x = 1\n\nimport not_a_module\n",
            3,
            "ModuleNotFoundError: No module named 'not_a_module'",
        ),
        ("def g():\n    raise ValueError('a\\nb')\n\ng()\n", 2, "ValueError: a b"),
        ("raise SystemExit(3)\n", 1, "SystemExit: 3"),
    ],
)
def test_a_file_that_does_not_run_is_refused_with_its_line(tmp_path, text, line, reason):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        parse_reward(f"{file}:f")
    assert f"{file}, line {line}: {reason}" in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_of_a_users_file_name_its_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def odd(batch, context):\n    return [float('nan')] * len(batch)\n")
    with pytest.raises(RewardError, match="reward odd, term 'odd': value nan"):
        parse_reward(f"{file}:odd").build(RewardContext(history=HISTORY)).score(decoded(SERIES))


@pytest.mark.parametrize(
    ("spec", "view", "scores"),
    [
        (r"regex:\+\d+$", "text", [1, 0, 0]),
        ("answer:  Yes ", "text", [0, 1, 0]),
        ("length:target=4", "tokens", [-0.25, -0.25, -1]),
        ("2*length:target=5+length:target=10", "tokens", [-1.5, -0.5, -3]),
    ],
)
def test_text_rewards_are_exact(spec, view, scores):
    factory = parse_reward(spec)
    assert factory.view == view
    assert factory.build(RewardContext(prompt="p")).score(
        texts("1+2", " yES\n", "")
    ) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("reward", "view"),
    [(Regex("a"), "text"), (Answer("a"), "text"), (Bounds(HISTORY, 0.0), "series")],
)
def test_a_reward_refuses_samples_without_its_view(reward, view):
    with pytest.raises(RewardError, match=f"needs the {view}"):
        reward.score([Decoded((1, 2))])


def save_scorer(folder, kind: str, num_labels: int = 1):
    """A tiny random sequence classifier, or causal model, with a tokenizer of words, in a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BertConfig,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "good", "bad", "is", "it"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes = {"vocab_size": 6, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config_class = BertConfig if kind == "bert" else LlamaConfig
    config = config_class(
        **sizes,
        num_attention_heads=2,
        max_position_embeddings=24,
        num_labels=num_labels,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    family = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    module = family.from_config(config).eval()
    module.save_pretrained(folder)
    return module, words


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_reward_model_scores_by_its_own_logit_of_prompt_and_text(tmp_path, kind):
    import torch

    module, words = save_scorer(tmp_path, kind)
    answers = ["good", "bad bad", "it is good is it bad", "", "is bad"]
    factory = parse_reward(f"reward_model:{tmp_path}")
    assert (factory.view, factory.scores_forecasts) == ("text", False)
    with torch.inference_mode():
        rows = [[words[w] for w in f"it is {answer}".split()] for answer in answers]
        logits = [float(module(torch.tensor([row])).logits[0, 0]) for row in rows]
    assert np.ptp(logits) > 0.01
    have = factory.build(RewardContext(prompt="it is ")).score(texts(*answers))
    assert have == pytest.approx(logits, abs=1e-5)
    for size in (1, 2, 3):
        reward = RewardModel(str(tmp_path), "it is ", batch_size=size)
        assert reward.score(texts(*answers)) == pytest.approx(logits, abs=1e-5)
        assert reward.score(texts(*answers)).tolist() == reward.score(texts(*answers)).tolist()
    assert RewardModel(str(tmp_path), "bad ").score(texts("good")) != pytest.approx(
        have[:1], abs=1e-3
    )
    with pytest.raises(RewardError, match="25 tokens, allowed: 24"):
        reward.score(texts("good " * 23))


def test_reward_models_that_cannot_be_used_are_refused(tmp_path):
    for name in ("nowhere", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(ConfigurationError, match="neither a directory nor a hub id"):
            parse_reward(f"reward_model:{name}")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        parse_reward(f"reward_model:{tmp_path / 'pickle'}")
    for kind, labels, error, what in (
        ("llama", 3, ConfigurationError, "3 outputs, allowed: 1"),
        ("causal", 1, CheckpointError, "lacks the weights"),
    ):
        save_scorer(tmp_path / kind, kind, labels)
        factory = parse_reward(f"reward_model:{tmp_path / kind}")
        with pytest.raises(error, match=what):
            factory.build(RewardContext(prompt="it")).score(texts("is"))
        with pytest.raises(ConfigurationError, match="needs the prompt"):
            factory.build(RewardContext(history=HISTORY))
