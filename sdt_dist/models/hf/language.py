"""A Transformers language model with its tokenizer: what `load_model` returns for text (SPEC section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.models.hf.model import HFModel
from sdt_dist.models.interface import end_tokens
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.text import TextCodec
from sdt_dist.protocols import PriorLaw


class LanguageModel:
    """A backend and a tokenizer; implements `LLMInterface`, and `process` gives what search works on."""

    is_forecaster = False

    def __init__(self, model: HFModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = model.vocab_size
        generation = getattr(model.module, "generation_config", None)
        configured = getattr(generation, "eos_token_id", None)
        self.eos_token_id: int | list[int] | None = configured if configured is not None else tokenizer.eos_token_id  # type: ignore[assignment]

    def encode_text(self, text: str) -> list[int]:
        # verbose=False: a prompt that is too long is refused by us, so the tokenizer need not warn of it as well
        return list(self.tokenizer(text, verbose=False)["input_ids"])  # type: ignore[arg-type]

    def decode_tokens(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def get_next_token_logits(self, token_sequence: list[int]) -> np.ndarray:
        """Logits [V] after a sequence, by the module itself (the slow reference path)."""
        ids = torch.tensor([token_sequence], device=self.model.device)
        return self.model.module(input_ids=ids).logits[0, -1].float().cpu().numpy()

    def get_top_k_tokens(self, sequence: list[int], k: int) -> list[tuple[int, float]]:
        """The k most probable next tokens with their log-probabilities."""
        log_probs = torch.log_softmax(torch.from_numpy(self.get_next_token_logits(sequence)).double(), -1)
        values, tokens = log_probs.topk(k)
        return list(zip(tokens.tolist(), values.tolist(), strict=True))

    def process(self, max_new_tokens: int, **law_options: Any) -> TokenProcess:
        """Tokens after a prompt, under `law(**law_options)`."""
        law = self.law(**law_options)
        return TokenProcess(
            self.model, law, max_new_tokens, encode_text=self.encode_text, decode_text=self.decode_tokens
        )

    def law(self, **law_options: Any) -> PriorLaw:
        """The definition of p; vocabulary rows beyond the tokenizer's are masked, as part of p."""
        real = min(len(self.tokenizer), self.vocab_size)
        return PriorLaw((0, real), end_tokens(self.eos_token_id), **law_options)

    def codec(self) -> TextCodec:
        """What this model's tokenizer does, without Transformers; ConfigurationError when it is no fast tokenizer."""
        return TextCodec.of(self.tokenizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers without progress bars and warnings while a model loads; its settings come back afterwards."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_language_model(name: str, *, device: str | None = None, trust_remote_code: bool = False) -> LanguageModel:
    """A causal language model from a directory or hub id, float32 on the CPU; safetensors only.

    ConfigurationError when it cannot be found, CheckpointError when only pickled weights exist, or weights are
    damaged or missing (Transformers would make them up).
    """
    directory = Path(name)
    if directory.is_dir() and not list(directory.glob("*.safetensors")):
        raise CheckpointError(f"model: {name} holds no .safetensors weights; pickled checkpoints are refused.")
    if not directory.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ConfigurationError(f"model: {name!r} is neither 'bundled', a directory, nor a hub id 'owner/name'.")
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if target == "cpu" else "auto"
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            module, loaded = cast(Any, AutoModelForCausalLM).from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model: {name!r} cannot be loaded: {_first_line(error)}") from error
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"model: {name!r} has damaged weights: {_first_line(error)}") from error
    if loaded["missing_keys"]:
        raise CheckpointError(f"model: {name!r} lacks weights, first {min(loaded['missing_keys'])!r}.")
    module.to(torch.device(target))  # type: ignore[arg-type]
    return LanguageModel(HFModel(module.eval()), tokenizer)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
