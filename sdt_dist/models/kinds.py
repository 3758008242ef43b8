"""Kinds of models, by the name that cards give them: how their states read, and what they answer without their weights.

See docs/architecture/search.md. This registry is the one place that tells kinds apart; everyone else asks the model, its
card, its process or its MODEL SPEC. It must not import torch or transformers.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.forecaster.process import ForecastStates
from sdt_dist.models.forecaster.spec import ForecasterSpec
from sdt_dist.models.forecaster.tokenizer import FIRST_BIN
from sdt_dist.models.process import LawfulStates, TokenStates
from sdt_dist.models.text import TextCodec
from sdt_dist.parts import Form
from sdt_dist.protocols import ModelFacts, PriorLaw


class Described(Protocol):
    """What of a card a kind reads; `spec` has the kind's own fields."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def spec(self) -> dict[str, Any]: ...


class ModelKind(Protocol):
    """One kind of model.

    sample_view: what of a sample a plain function is given as a reward. is_small: a machine holds several copies of it.
    spec_is_whole: the spec says all that defines the model besides its weights.
    """

    sample_view: Form
    is_small: bool
    spec_is_whole: bool

    def states(
        self, card: Described, facts: ModelFacts, max_new_tokens: int, **law_options: Any
    ) -> LawfulStates:
        """How the model's states read; SdtError for a malformed spec or a length that the model does not have."""
        ...

    def saved_spec(self, path: Path | None) -> dict[str, Any]:
        """The spec as it is saved beside the weights, empty where it is not; CheckpointError for a damaged one."""
        ...

    def allowed(self, card: Described) -> tuple[int, int]:
        """The range [low, high) of tokens that it generates; ConfigurationError where the spec has none."""
        ...

    def token_values(self, card: Described) -> tuple[float, float] | None:
        """The numbers that the first and the last allowed token stand for, evenly spaced between; None without numbers."""
        ...

    def context_length(self, card: Described) -> int | None:
        """How many of a series' last values count; None where it takes no series."""
        ...


class _Forecaster:
    """A forecaster; its spec is a `ForecasterSpec`."""

    sample_view: Form = "series"
    is_small = True
    spec_is_whole = True

    def states(
        self, card: Described, facts: ModelFacts, max_new_tokens: int, **law_options: Any
    ) -> LawfulStates:
        return ForecastStates(facts, self._spec(card), max_new_tokens, **law_options)

    def saved_spec(self, path: Path | None) -> dict[str, Any]:
        return {} if path is None else asdict(ForecasterSpec.load(path))

    def allowed(self, card: Described) -> tuple[int, int]:
        return FIRST_BIN, card.vocab_size

    def token_values(self, card: Described) -> tuple[float, float] | None:
        """Bin centres, in standard deviations of the history."""
        limit = float(self._spec(card).limit)
        return -limit, limit

    def context_length(self, card: Described) -> int | None:
        return self._spec(card).context_length

    def _spec(self, card: Described) -> ForecasterSpec:
        return ForecasterSpec.of(card.spec, f"model card of {card.name!r}:")


class _Tokens:
    """A model of token ids; its spec has the `allowed` range and the `end_tokens` of p."""

    sample_view: Form = "tokens"
    is_small = False
    spec_is_whole = False

    def states(
        self, card: Described, facts: ModelFacts, max_new_tokens: int, **law_options: Any
    ) -> LawfulStates:
        return TokenStates(facts, self._law(card, law_options), max_new_tokens)

    def saved_spec(self, path: Path | None) -> dict[str, Any]:
        return {}

    def allowed(self, card: Described) -> tuple[int, int]:
        try:
            low, high = card.spec["allowed"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"model card of {card.name!r}: no range of allowed tokens ({error})."
            ) from error
        return int(low), int(high)

    def token_values(self, card: Described) -> tuple[float, float] | None:
        return None

    def context_length(self, card: Described) -> int | None:
        return None

    def _law(self, card: Described, law_options: dict[str, Any]) -> PriorLaw:
        spec = card.spec
        try:
            return PriorLaw(tuple(spec["allowed"]), tuple(spec["end_tokens"]), **law_options)
        except (KeyError, TypeError) as error:
            raise ConfigurationError(
                f"model card of {card.name!r}: its definition of p is malformed ({error})."
            ) from error


class _Language(_Tokens):
    """A language model: as one of token ids, and its spec has the `tokenizer` too."""

    def states(
        self, card: Described, facts: ModelFacts, max_new_tokens: int, **law_options: Any
    ) -> LawfulStates:
        law = self._law(card, law_options)
        codec = TextCodec.load(card.spec.get("tokenizer"))
        return TokenStates(
            facts, law, max_new_tokens, encode_text=codec.encode, decode_text=codec.decode
        )


KINDS: dict[str, ModelKind] = {
    "forecaster": _Forecaster(),
    "language": _Language(),
    "tokens": _Tokens(),
}


def law_spec(law: PriorLaw) -> dict[str, Any]:
    """What a spec says of a definition of p."""
    return {"allowed": list(law.allowed), "end_tokens": list(law.end_tokens)}
