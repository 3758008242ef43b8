"""A small Llama on disk, and vLLM engines over it (CPU build; `make test-vllm`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdt_dist.models.hf.model import HFModel
from sdt_dist.protocols import PriorLaw, Root, prompt_digest

VOCABULARY = 48
CONTEXT = 160
END = 3
LAW = PriorLaw((0, VOCABULARY), (END,))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, initializer_range=0.3, eos_token_id=END,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).eval().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def plain(folder: Path) -> HFModel:
    """The same network by Transformers, which every answer is compared with."""
    return HFModel(LlamaForCausalLM.from_pretrained(folder).eval())


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., Any]]:
    """Opens engines of a test; they end with it."""
    from sdt_dist.models.vllm.loading import open_model

    models: list[Any] = []

    def make(**settings: Any) -> Any:
        models.append(open_model(folder, **settings))
        return models[-1]

    yield make
    for model in models:
        model.close()


def root(number: int, length: int = 40) -> Root:
    prompt = tuple(np.random.default_rng(number).integers(4, VOCABULARY, length).tolist())
    return Root(prompt, prompt_digest(prompt))


def same(left: Any, right: Any) -> bool:
    """Equal tokens, and log-probabilities to 1e-4."""
    return left.tokens.tolist() == right.tokens.tolist() and np.allclose(
        left.log_prob, right.log_prob, rtol=0, atol=1e-4
    )
