"""Token processes: states under one definition of p and a length limit, and a backend's calls for them.

See docs/architecture/search.md.

The states answer without the backend, so that a search can run where its model is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sdt_dist.errors import ConfigurationError, ContextError
from sdt_dist.parts import Context, Form, TextPart, TokensPart, as_context, only_part
from sdt_dist.protocols import (
    Decoded,
    ExpandRequest,
    Expansion,
    FinishReason,
    Flow,
    LogitsModel,
    ModelFacts,
    PriorLaw,
    Rollout,
    RolloutRequest,
    Root,
    States,
    prompt_digest,
)


def check_law(law: PriorLaw, vocab_size: int) -> None:
    """Refuse a definition of p that cannot be sampled from; ConfigurationError names the field."""
    low, high = law.allowed
    if not 0 <= low < high <= vocab_size:
        raise ConfigurationError(
            f"allowed: {law.allowed}, must be a non-empty range within [0, {vocab_size})."
        )
    if not law.sampling_temperature > 0:
        raise ConfigurationError(f"sampling_temperature: {law.sampling_temperature}, must be > 0.")
    if law.top_k is not None and law.top_k < 1:
        raise ConfigurationError(f"top_k: {law.top_k}, must be >= 1 or None.")
    if law.top_p is not None and not 0 < law.top_p <= 1:
        raise ConfigurationError(f"top_p: {law.top_p}, must be in (0, 1] or None.")


def check_holds_flows(model: Any) -> Any:
    """The model; ConfigurationError where it cannot hold flows."""
    if not hasattr(model, "load_flow"):
        raise ConfigurationError(
            f"flow: {type(model).__name__} cannot hold flow networks; allowed: hf and mlx models, toys, objects with "
            "LLMInterface, and `sdt serve --flow` of one of these. Leave the flow out, or load the model with one of these."
        )
    return model


class LawfulStates(States, Protocol):
    """States under a definition of p."""

    @property
    def law(self) -> PriorLaw: ...

    @property
    def are_tokens_ordered(self) -> bool:
        """Whether tokens are values, neighbours next to each other."""
        ...

    @property
    def context_length(self) -> int | None:
        """How many of a series' last values count; None where it takes no series."""
        ...


class TokenStates:
    """States that are the tokens generated after a prompt, of a backend with these facts.

    A state is finished by an end token of the law or by length at `max_new_tokens` (the prompt never counts).
    ConfigurationError, naming the field, for a law that cannot be sampled from or a length below 1.
    """

    def __init__(
        self,
        facts: ModelFacts,
        law: PriorLaw,
        max_new_tokens: int,
        *,
        encode_text: Callable[[str], list[int]] | None = None,
        decode_text: Callable[[list[int]], str] | None = None,
    ) -> None:
        check_law(law, facts.vocab_size)
        if max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens: {max_new_tokens}, must be >= 1.")
        self.facts = facts
        self.law = law
        self.max_new_tokens = max_new_tokens
        self._encode_text = encode_text
        self._decode_text = decode_text

    @property
    def deterministic(self) -> bool:
        return self.facts.deterministic

    @property
    def top_k(self) -> int | None:
        """The law's top_k: to how many most probable tokens p is cut, or None."""
        return self.law.top_k

    @property
    def takes(self) -> tuple[Form, ...]:
        """The forms of context that it can continue."""
        return ("tokens",) if self._encode_text is None else ("text", "tokens")

    @property
    def sample_view(self) -> Form:
        """What of a sample a plain function is given as a reward."""
        return "tokens"

    @property
    def are_tokens_ordered(self) -> bool:
        return False

    @property
    def context_length(self) -> int | None:
        return None

    def root(self, context: Any) -> Root:
        """The root of a context, or of what `as_context` reads as one: a string, or token ids.

        ContextError when it is empty, too long, or of a form that this process does not take.
        """
        prompt = self._prompt(as_context(context, self.takes))
        if not prompt:
            raise ContextError("prompt: empty; a prompt needs at least one token.")
        if len(prompt) + self.max_new_tokens > self.facts.max_context:
            raise ContextError(
                f"prompt: {len(prompt)} tokens and max_new_tokens {self.max_new_tokens} exceed the model's context of "
                f"{self.facts.max_context}; shorten the prompt or lower max_new_tokens."
            )
        bad = [token for token in prompt if not 0 <= token < self.facts.vocab_size]
        if bad:
            raise ContextError(
                f"prompt: token id {bad[0]}, allowed 0 to {self.facts.vocab_size - 1}."
            )
        return Root(prompt, prompt_digest(prompt))

    def _prompt(self, context: Context) -> tuple[int, ...]:
        match only_part(context, self.takes):
            case TextPart(text=text):
                assert self._encode_text is not None
                return tuple(self._encode_text(text))
            case TokensPart(ids=ids):
                return ids
        raise AssertionError("only_part lets no other form through")

    def is_finished(self, tokens: Sequence[int]) -> bool:
        return len(tokens) >= self.max_new_tokens or (
            len(tokens) > 0 and tokens[-1] in self.law.end_tokens
        )

    def finish_reason(self, tokens: Sequence[int]) -> FinishReason:
        """Why a finished state ended: "eos" when its last token is an end token."""
        return "eos" if len(tokens) > 0 and tokens[-1] in self.law.end_tokens else "length"

    def decode(self, root: Root, sequences: Sequence[tuple[int, ...]]) -> list[Decoded]:
        """Answers without their end token, with text where the model has a tokenizer."""
        answers = [
            tuple(s[:-1]) if s and s[-1] in self.law.end_tokens else tuple(s) for s in sequences
        ]
        if self._decode_text is None:
            return [Decoded(answer) for answer in answers]
        return [Decoded(answer, text=self._decode_text(list(answer))) for answer in answers]


class ModelProcess:
    """A backend as search sees it: how its states read, and its calls under their definition of p."""

    def __init__(self, states: LawfulStates, model: LogitsModel) -> None:
        self.states = states
        self.model = model

    @property
    def law(self) -> PriorLaw:
        return self.states.law

    @property
    def max_new_tokens(self) -> int:
        return self.states.max_new_tokens

    @property
    def deterministic(self) -> bool:
        return self.states.deterministic

    @property
    def top_k(self) -> int | None:
        return self.states.top_k

    @property
    def takes(self) -> tuple[Form, ...]:
        return self.states.takes

    @property
    def sample_view(self) -> Form:
        return self.states.sample_view

    def root(self, context: Any) -> Root:
        return self.states.root(context)

    def is_finished(self, tokens: Sequence[int]) -> bool:
        return self.states.is_finished(tokens)

    def finish_reason(self, tokens: Sequence[int]) -> FinishReason:
        return self.states.finish_reason(tokens)

    def decode(self, root: Root, sequences: Sequence[tuple[int, ...]]) -> list[Decoded]:
        return self.states.decode(root, sequences)

    def load_flow(self, flow: Flow) -> None:
        """Let requests have tilts by this flow; ConfigurationError where the model cannot hold flows."""
        check_holds_flows(self.model).load_flow(flow)

    def expand(self, requests: Sequence[ExpandRequest]) -> list[Expansion]:
        return self.model.expand(requests, self.law)

    def rollout(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        return self.model.rollout(requests, self.law)

    def release(self, root: Root) -> None:
        self.model.release(root)


class TokenProcess(ModelProcess):
    """An autoregressive model as search sees it: `TokenStates` and the calls of the model that they are of."""

    def __init__(
        self,
        model: LogitsModel,
        law: PriorLaw,
        max_new_tokens: int,
        *,
        encode_text: Callable[[str], list[int]] | None = None,
        decode_text: Callable[[list[int]], str] | None = None,
    ) -> None:
        states = TokenStates(
            model, law, max_new_tokens, encode_text=encode_text, decode_text=decode_text
        )
        super().__init__(states, model)
