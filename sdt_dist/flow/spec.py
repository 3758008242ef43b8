"""What defines a flow network besides its weights (docs/concepts/flow.md). It must not import torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeGuard

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.models.card import ModelCard

MIN_SEGMENT = 4
_PATCH = 8  # values of a forecaster's history that the context encoder reads at once
_MOST = {"segment": 1024, "num_layers": 16, "hidden_size": 4096, "key_size": 4096, "patch": 1024}
_MOST_SIZE = 2**20  # far beyond any flow; larger sizes are damage, and would fill the memory


@dataclass(frozen=True, slots=True)
class FlowSpec:
    """Sizes and vocabulary of a flow network.

    vocab_size V: token ids a prompt may hold; allowed: half-open range [low, high) of generated tokens, V' = high - low;
    values: the numbers that the first and the last allowed token stand for (bin centres, evenly spaced between), or None
    where tokens have none; context_length: how many of a prompt's last tokens are read, `patch` of them per step of the
    context encoder; max_new_tokens: the most generated tokens; segment: values in one Welch segment of a sample
    (at most as many as it has); hidden_size and num_layers of the GRUs; key_size: width in
    which states and tokens are multiplied.
    """

    vocab_size: int
    allowed: tuple[int, int]
    max_new_tokens: int
    values: tuple[float, float] | None = None
    context_length: int = 64
    patch: int = 1
    segment: int = 24
    hidden_size: int = 64
    num_layers: int = 1
    key_size: int = 32

    def __post_init__(self) -> None:
        self._check()

    @property
    def num_tokens(self) -> int:
        """V', how many tokens can be generated."""
        return self.allowed[1] - self.allowed[0]

    @property
    def running_segment(self) -> int:
        """Values in one segment of a sample's spectrum."""
        return min(self.segment, self.max_new_tokens)

    @property
    def step(self) -> float:
        """Distance of the values of two neighbouring tokens; 0 without values."""
        return (
            0.0
            if self.values is None
            else (self.values[1] - self.values[0]) / max(1, self.num_tokens - 1)
        )

    @classmethod
    def of_card(cls, card: ModelCard, max_new_tokens: int, **sizes: Any) -> FlowSpec:
        """The spec for a model: its vocabulary, and a forecaster's bin centres, in standard deviations, and segment.

        The segment is that of a spectral reward for samples of max_new_tokens values: half of them.
        """
        values = card.token_values
        if values is not None:
            sizes.setdefault("values", values)
            sizes.setdefault("segment", max(MIN_SEGMENT, max_new_tokens // 2))
            sizes.setdefault("context_length", card.context_length)
            sizes.setdefault("patch", _PATCH)
            sizes.setdefault("hidden_size", 96)
        return cls(card.vocab_size, card.allowed, max_new_tokens, **sizes)

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> FlowSpec:
        """The spec with these fields, from JSON; CheckpointError, naming their owner, when they describe no network."""
        pairs: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        try:
            return cls(**pairs)
        except TypeError as error:
            raise CheckpointError(
                f"{owner}: missing or unknown fields ({error}); give a flow saved by us."
            ) from error
        except ConfigurationError as error:
            raise CheckpointError(f"{owner}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `of` reads them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def _check(self) -> None:
        """ConfigurationError, naming the field, when this describes no network."""
        for name in (
            field.name for field in fields(self) if field.name not in ("allowed", "values")
        ):
            value = getattr(self, name)
            most = _MOST.get(name, _MOST_SIZE)
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigurationError(
                    f"flow spec: {name}: {value!r}, allowed: a whole number from 1 to {most}."
                )
        if (
            not _is_pair(self.allowed, int)
            or not 0 <= self.allowed[0] < self.allowed[1] <= self.vocab_size
        ):
            raise ConfigurationError(
                f"flow spec: allowed: {self.allowed!r}, must be a non-empty range within [0, {self.vocab_size})."
            )
        rises = (
            _is_pair(self.values, float) and -math.inf < self.values[0] < self.values[1] < math.inf
        )
        if self.values is not None and not rises:
            raise ConfigurationError(
                f"flow spec: values: {self.values!r}, allowed: None or two finite rising floats."
            )


def _is_pair(value: Any, kind: type[Any]) -> TypeGuard[tuple[Any, Any]]:
    return (
        isinstance(value, tuple) and len(value) == 2 and all(type(item) is kind for item in value)
    )
