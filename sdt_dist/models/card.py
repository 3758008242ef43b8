"""A model's card: what other processes must know to search a model that answers elsewhere.

See docs/architecture/search.md, docs/architecture/fleet.md.

A card is plain JSON. From it come the states that the loaded model itself would give, and with any LogitsModel its process,
without torch or transformers; this module must not import them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.kinds import KINDS, law_spec
from sdt_dist.models.process import LawfulStates, ModelProcess
from sdt_dist.parts import Form
from sdt_dist.protocols import LogitsModel, ModelFacts, PriorLaw

_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
_TYPES = {"kind": str, "name": str, "identity": str, "vocab_size": int, "max_context": int, "deterministic": bool,
          "spec": dict}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model is, without its weights.

    identity: 32 hex digits, a hash of the weights and of all else that defines p and decoding; equal models have equal
    ones, so it names the model in evidence keys. name: how it was asked for, for people. spec: a forecaster's spec;
    else the `allowed` range and the `end_tokens` of p, and a language model's `tokenizer`.
    """

    kind: str
    name: str
    identity: str
    vocab_size: int
    max_context: int
    deterministic: bool
    spec: dict[str, Any]

    @property
    def sample_view(self) -> Form:
        """What of a sample a plain function is given as a reward."""
        return KINDS[self.kind].sample_view

    @property
    def allowed(self) -> tuple[int, int]:
        """The range [low, high) of tokens that the model generates; ConfigurationError where it has none."""
        return KINDS[self.kind].allowed(self)

    @property
    def token_values(self) -> tuple[float, float] | None:
        """The numbers that the first and the last allowed token stand for, evenly spaced between; None without numbers."""
        return KINDS[self.kind].token_values(self)

    @property
    def context_length(self) -> int | None:
        """How many of a series' last values count; None for a model that takes no series."""
        return KINDS[self.kind].context_length(self)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelCard:
        """The card in JSON; ConfigurationError, naming the field, when it is none."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"model card: not JSON ({error}).") from error
        wanted = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(wanted):
            raise ConfigurationError(f"model card: must have the fields {', '.join(wanted)}.")
        for name, kind in _TYPES.items():
            if type(values[name]) is not kind:
                raise ConfigurationError(f"model card: {name} must be of type {kind.__name__}.")
        if values["kind"] not in KINDS:
            raise ConfigurationError(
                f"model card: kind {values['kind']!r}, allowed: {', '.join(KINDS)}."
            )
        return cls(**values)


class ServedModel:
    """A model that answers elsewhere, as `load_model` returns one: `model` reaches it, `process` searches it."""

    def __init__(self, card: ModelCard, model: LogitsModel) -> None:
        self.card = card
        self.model = model

    @property
    def sample_view(self) -> Form:
        return self.card.sample_view

    def process(self, max_new_tokens: int, **law_options: Any) -> ModelProcess:
        """What search works on; `law_options` are sampling_temperature, top_k and top_p of p."""
        return process_of(self.card, self.model, max_new_tokens, **law_options)


def card_of(loaded: Any, name: str = "") -> ModelCard:
    """The card of a `Forecaster`, a `LanguageModel`, a `ServedModel`, or a LogitsModel with a `law` such as `Toy`.

    `name` is the MODEL SPEC it was loaded from. Hashes the weights, about a second a gigabyte. ConfigurationError for
    what cannot be named (give it an `identity`: a string that stands for its weights) or described.
    """
    if isinstance(loaded, ServedModel):
        return loaded.card
    kind, model, spec = _describe(loaded)
    return ModelCard(
        kind=kind,
        name=name or type(loaded).__name__,
        identity=_identity(model, {"kind": kind, **spec}),
        vocab_size=int(model.vocab_size),
        max_context=int(model.max_context),
        deterministic=bool(model.deterministic),
        spec=spec,
    )


def process_of(
    card: ModelCard, model: LogitsModel, max_new_tokens: int, **law_options: Any
) -> ModelProcess:
    """The process that the card's loaded model gives for `max_new_tokens`, over any backend that answers for it."""
    return ModelProcess(states_of(card, model, max_new_tokens, **law_options), model)


def states_of(
    card: ModelCard, facts: ModelFacts, max_new_tokens: int, **law_options: Any
) -> LawfulStates:
    """How the states of the card's model read, wherever the model is; `facts` are the card's, or a backend's own."""
    return KINDS[card.kind].states(card, facts, max_new_tokens, **law_options)


def _describe(loaded: Any) -> tuple[str, Any, dict[str, Any]]:
    """(kind, backend, spec) of a loaded model, as it says itself; what has a law and no more is one of token ids."""
    if hasattr(loaded, "card_spec"):
        kind, spec = loaded.card_spec()
        return kind, loaded.model, spec
    law = getattr(loaded, "law", None)
    if not isinstance(law, PriorLaw):
        raise ConfigurationError(
            f"model: {type(loaded).__name__} cannot be served; allowed: what sdt.load_model returns, or a LogitsModel "
            "with a `law` (a PriorLaw)."
        )
    return "tokens", loaded, law_spec(law)


def _identity(model: Any, described: dict[str, Any]) -> str:
    """A hash of a backend's weights and of what else defines the model."""
    given = getattr(model, "identity", None)
    if given is not None:
        described = {**described, "identity": str(given)}
    elif hasattr(model, "config_values") and not KINDS[described["kind"]].spec_is_whole:
        config = model.config_values()
        described = {
            **described,
            "config": {k: v for k, v in config.items() if k not in _NOT_THE_MODEL},
        }
    digest = hashlib.blake2b(
        json.dumps(described, sort_keys=True, default=str).encode(), digest_size=16
    )
    for label, array in () if given is not None else _weights(model):
        digest.update(f"{label}:{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _weights(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Named arrays that define a backend: its weights, or its tables."""
    named_weights = getattr(model, "named_weights", None)
    tables = getattr(model, "log_prob_tables", None)
    if named_weights is not None:
        yield from named_weights()
    elif tables is not None:
        yield from ((f"table {depth}", table) for depth, table in enumerate(tables))
    else:
        raise ConfigurationError(
            f"model: {type(model).__name__} has no `identity`; give it one, a string that stands for its weights."
        )
