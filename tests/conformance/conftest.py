"""Backends under one conformance suite, each with a prompt it can continue."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sdt_dist.models.hf.model import HFModel
from sdt_dist.models.interface import InterfaceModel
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import (
    ExpandRequest,
    Expansion,
    LogitsModel,
    PriorLaw,
    Rollout,
    RolloutRequest,
    Root,
    prompt_digest,
)
from tests.http_helpers import RunningServer, tokens_card

VOCABULARY = 24
CONTEXT = 48
END = 3
# vLLM caches whole blocks of 32 positions
LONG_CONTEXT = 96
LONG_PROMPT = 40
TOY_VOCABULARY = 5


class Interface:
    """An `LLMInterface` object with a fixed random table of bigram logits."""

    vocab_size = VOCABULARY
    eos_token_id = END
    max_context = CONTEXT

    def __init__(self) -> None:
        self._table = np.random.default_rng(3).standard_normal((VOCABULARY, VOCABULARY))

    def get_next_token_logits(self, token_sequence: list[int]) -> np.ndarray:
        return self._table[token_sequence[-1]] + 0.1 * self._table[len(token_sequence) % VOCABULARY]


def _llama(heads: int, kv_heads: int, context: int = CONTEXT) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=context, initializer_range=0.3, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _gpt2() -> torch.nn.Module:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=END,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@dataclass
class Backend:
    """A fresh model, its law and a prompt maker; `tolerance` of log p where a row's bits may depend on its batch.

    `modules` holds Transformers' own module with the same weights, where there is one.
    """

    make: Callable[..., LogitsModel]
    law: PriorLaw
    max_new: int
    prompt_length: int = 6
    tolerance: float = 0.0
    modules: list[torch.nn.Module] = field(default_factory=list)
    servers: list[RunningServer] = field(default_factory=list)

    def root(self, number: int = 0) -> Root:
        if self.prompt_length == 1:
            return Root((number % TOY_VOCABULARY,), prompt_digest((number,)))
        prompt = tuple(
            np.random.default_rng(number).integers(4, VOCABULARY, self.prompt_length).tolist()
        )
        return Root(prompt, prompt_digest(prompt))

    def path(self, model: LogitsModel, root: Root, length: int, key: int = 11) -> tuple[int, ...]:
        """A prefix without end tokens, the first that seeded rollouts find."""
        for attempt in range(100):
            (reply,) = model.rollout([RolloutRequest(root, (), length, key + attempt)], self.law)
            if reply.finish_reason == "length":
                return tuple(reply.tokens.tolist())
        raise AssertionError("no prefix without an end token")

    def tokens(self, count: int) -> list[int]:
        """`count` allowed tokens that end nothing; they repeat where there are too few."""
        allowed = [token for token in range(*self.law.allowed) if token not in self.law.end_tokens]
        return [allowed[i % len(allowed)] for i in range(count)]

    def alone(
        self, requests: Sequence[ExpandRequest | RolloutRequest], law: PriorLaw | None = None
    ) -> list[Expansion | Rollout]:
        """Replies of a fresh model that is asked for one at a time and forgets each problem before the next."""
        model = self.make()
        replies = []
        for request in requests:
            ask = model.rollout if isinstance(request, RolloutRequest) else model.expand
            replies += ask([request], law or self.law)  # type: ignore[arg-type]
            model.release(request.root)
        return replies

    def same(self, left: Expansion | Rollout, right: Expansion | Rollout) -> bool:
        """Equal tokens, and probabilities that are equal bitwise unless the backend promises less."""
        if isinstance(left, Rollout) != isinstance(right, Rollout):
            return False
        mine, other = (
            (r.tokens if isinstance(r, Rollout) else r.children).tolist() for r in (left, right)
        )
        return mine == other and all(
            np.allclose(a, b, rtol=0.0, atol=self.tolerance)
            for a, b in [
                (left.log_prob, right.log_prob),
                (np.exp(left.log_residual), np.exp(right.log_residual)),
                (left.num_remaining, right.num_remaining),
            ]
        )


def _hf(module: torch.nn.Module) -> Backend:
    return Backend(
        lambda **options: HFModel(module, **options),
        PriorLaw((0, VOCABULARY), (END,)),
        20,
        modules=[module],
    )


def _mlx() -> Backend:
    """The Llama of hf-llama-gqa, saved by Transformers and loaded by mlx-lm."""
    from sdt_dist.models.mlx.loading import load_module
    from sdt_dist.models.mlx.model import MlxModel

    plain = _llama(4, 2)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        module, config = load_module(folder)
    return Backend(
        lambda **options: MlxModel(module, config, **options),
        PriorLaw((0, VOCABULARY), (END,)),
        20,
        tolerance=1e-4,
        modules=[plain],
    )


@cache
def _vllm_engines() -> tuple[object, Callable[..., LogitsModel]]:
    """A saved Llama, and a maker of models on it: one engine, and one with room for two short sequences only."""
    from sdt_dist.models.vllm.loading import open_model
    from sdt_dist.models.vllm.model import VllmModel

    plain = _llama(2, 1, LONG_CONTEXT)
    folder = tempfile.TemporaryDirectory()
    plain.save_pretrained(folder.name)
    engines: dict[bool, VllmModel] = {}

    def make(cache_bytes: int | None = None) -> LogitsModel:
        tight = cache_bytes is not None
        if tight not in engines:
            settings = {"num_gpu_blocks_override": 5} if tight else {}
            engines[tight] = open_model(Path(folder.name), keep=folder, **settings)
        return engines[tight].forgetful_copy()

    return plain, make


def _vllm() -> Backend:
    plain, make = _vllm_engines()
    return Backend(
        make,
        PriorLaw((0, VOCABULARY), (END,)),
        20,
        prompt_length=LONG_PROMPT,
        tolerance=1e-4,
        modules=[plain],
    )


def _over_http(local: Backend) -> Backend:
    """The same backend behind a server of its own: real sockets, a real client."""
    served = replace(local, servers=[])

    def make(**options: object) -> LogitsModel:
        model = local.make(**options)
        served.servers.append(RunningServer(model, tokens_card(model, local.law)))
        return served.servers[-1].client()

    served.make = make
    return served


BACKENDS: dict[str, Callable[[], Backend]] = {
    "toy": lambda: Backend(
        lambda **options: Toy(TOY_VOCABULARY, 6, 1.0),
        PriorLaw((0, TOY_VOCABULARY)),
        6,
        prompt_length=1,
    ),
    "interface": lambda: Backend(
        lambda **options: InterfaceModel(Interface(), **options),
        PriorLaw((0, VOCABULARY), (END,)),
        20,
    ),
    "hf-llama": lambda: _hf(_llama(4, 4)),
    "hf-llama-gqa": lambda: _hf(_llama(4, 2)),
    "hf-module": lambda: _hf(_gpt2()),
    "mlx-llama": _mlx,
    "vllm-llama": _vllm,
    "http-toy": lambda: _over_http(BACKENDS["toy"]()),
    "http-llama": lambda: _over_http(BACKENDS["hf-llama"]()),
    "http-mlx": lambda: _over_http(BACKENDS["mlx-llama"]()),
    "http-vllm": lambda: _over_http(BACKENDS["vllm-llama"]()),
}


TABLES = {"toy", "interface", "http-toy"}  # no Transformers module has their p


def params(names: Iterable[str]) -> list[object]:
    """Backends as parameters, with the markers of the packages that they need."""
    marks = {
        name: [getattr(pytest.mark, package) for package in ("mlx", "vllm") if package in name]
        for name in names
    }
    return [pytest.param(name, marks=marks[name]) for name in sorted(marks)]


@pytest.fixture(scope="session", params=params(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = BACKENDS[request.param]()
    yield made
    for server in made.servers:
        server.close()
