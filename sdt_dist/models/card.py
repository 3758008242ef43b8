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
from typing import Any, Literal, get_args

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.forecaster.process import ForecastStates
from sdt_dist.models.forecaster.spec import ForecasterSpec
from sdt_dist.models.process import LawfulStates, ModelProcess, TokenStates
from sdt_dist.models.text import TextCodec
from sdt_dist.protocols import LogitsModel, ModelFacts, PriorLaw

Kind = Literal["forecaster", "language", "tokens"]
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

    kind: Kind
    name: str
    identity: str
    vocab_size: int
    max_context: int
    deterministic: bool
    spec: dict[str, Any]

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
        if values["kind"] not in get_args(Kind):
            raise ConfigurationError(
                f"model card: kind {values['kind']!r}, allowed: {', '.join(get_args(Kind))}."
            )
        return cls(**values)


class ServedModel:
    """A model that answers elsewhere, as `load_model` returns one: `model` reaches it, `process` searches it."""

    def __init__(self, card: ModelCard, model: LogitsModel) -> None:
        self.card = card
        self.model = model

    @property
    def is_forecaster(self) -> bool:
        return self.card.kind == "forecaster"

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
    if card.kind == "forecaster":
        spec = ForecasterSpec.of(card.spec, f"model card of {card.name!r}:")
        return ForecastStates(facts, spec, max_new_tokens, **law_options)
    try:
        law = PriorLaw(tuple(card.spec["allowed"]), tuple(card.spec["end_tokens"]), **law_options)
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"model card of {card.name!r}: its definition of p is malformed ({error})."
        ) from error
    if card.kind == "tokens":
        return TokenStates(facts, law, max_new_tokens)
    codec = TextCodec.load(card.spec.get("tokenizer"))
    return TokenStates(
        facts, law, max_new_tokens, encode_text=codec.encode, decode_text=codec.decode
    )


def _describe(loaded: Any) -> tuple[Kind, Any, dict[str, Any]]:
    """(kind, backend, spec) of a loaded model."""
    is_forecaster = getattr(loaded, "is_forecaster", None)
    if is_forecaster:
        return "forecaster", loaded.model, asdict(loaded.spec)
    if is_forecaster is not None:
        return (
            "language",
            loaded.model,
            {**_law_spec(loaded.law()), "tokenizer": asdict(loaded.codec())},
        )
    law = getattr(loaded, "law", None)
    if not isinstance(law, PriorLaw):
        raise ConfigurationError(
            f"model: {type(loaded).__name__} cannot be served; allowed: what sdt.load_model returns, or a LogitsModel "
            "with a `law` (a PriorLaw)."
        )
    return "tokens", loaded, _law_spec(law)


def _law_spec(law: PriorLaw) -> dict[str, Any]:
    return {"allowed": list(law.allowed), "end_tokens": list(law.end_tokens)}


def _identity(model: Any, described: dict[str, Any]) -> str:
    """A hash of a backend's weights and of what else defines the model."""
    given = getattr(model, "identity", None)
    if given is not None:
        described = {**described, "identity": str(given)}
    elif hasattr(model, "config_values") and described["kind"] != "forecaster":
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
