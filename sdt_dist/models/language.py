"""A language model with its tokenizer, over any backend: what `load_model` returns for text.

See docs/architecture/search.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.special import log_softmax

from sdt_dist.models.interface import end_tokens
from sdt_dist.models.kinds import law_spec
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.text import TextCodec
from sdt_dist.parts import Form
from sdt_dist.protocols import LogitsModel, PriorLaw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextBackend(LogitsModel, Protocol):
    """A backend of a model that was trained on text: it also says what ends one, and scores single sequences."""

    @property
    def eos_token_id(self) -> int | list[int] | None: ...

    def reference_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [V] float32 after a sequence, without caches."""
        ...


class LanguageModel:
    """A backend and a tokenizer; implements `LLMInterface`, and `process` gives what search works on."""

    sample_view: Form = "tokens"

    def __init__(self, model: TextBackend, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = model.vocab_size
        configured = model.eos_token_id
        self.eos_token_id: int | list[int] | None = (
            configured if configured is not None else tokenizer.eos_token_id
        )  # type: ignore[assignment]

    def encode_text(self, text: str) -> list[int]:
        # verbose=False: a prompt that is too long is refused by us, so the tokenizer need not warn of it as well
        return list(self.tokenizer(text, verbose=False)["input_ids"])  # type: ignore[arg-type]

    def decode_tokens(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def get_next_token_logits(self, token_sequence: list[int]) -> np.ndarray:
        """Logits [V] after a sequence, by the module itself (the slow reference path)."""
        return self.model.reference_logits(token_sequence)

    def get_top_k_tokens(self, sequence: list[int], k: int) -> list[tuple[int, float]]:
        """The k most probable next tokens with their log-probabilities."""
        log_probs = log_softmax(self.get_next_token_logits(sequence).astype(np.float64))
        tokens = np.argsort(-log_probs, kind="stable")[:k]
        return list(zip(tokens.tolist(), log_probs[tokens].tolist(), strict=True))

    def process(self, max_new_tokens: int, **law_options: Any) -> TokenProcess:
        """Tokens after a prompt, under `law(**law_options)`."""
        law = self.law(**law_options)
        return TokenProcess(
            self.model,
            law,
            max_new_tokens,
            encode_text=self.encode_text,
            decode_text=self.decode_tokens,
        )

    def law(self, **law_options: Any) -> PriorLaw:
        """The definition of p; vocabulary rows beyond the tokenizer's are masked, as part of p."""
        real = min(len(self.tokenizer), self.vocab_size)
        return PriorLaw((0, real), end_tokens(self.eos_token_id), **law_options)

    def card_spec(self) -> tuple[str, dict[str, Any]]:
        """What a card says of it: the name of its kind, and that kind's spec."""
        return "language", {**law_spec(self.law()), "tokenizer": asdict(self.codec())}

    def codec(self) -> TextCodec:
        """What this model's tokenizer does, without Transformers; ConfigurationError when it is no fast tokenizer."""
        return TextCodec.of(self.tokenizer)
