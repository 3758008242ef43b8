"""What defines a forecaster besides its weights, and how its network is built."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdt_dist.data.scale import MIN_HISTORY
from sdt_dist.errors import CheckpointError
from sdt_dist.files import write_text
from sdt_dist.models.forecaster.tokenizer import EOS, FIRST_BIN, PAD, ValueTokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FORMAT = "sdt-forecaster/1"
SPEC_FILE = "forecaster.json"
BUNDLED = Path(__file__).parent / "weights"
# far beyond any forecaster; larger sizes are damage, and would fill the memory
_MOST = 2**20
_MOST_LAYERS = 1000
_LEAST = {"context_length": MIN_HISTORY, "vocab_size": FIRST_BIN + 2}


@dataclass(frozen=True, slots=True)
class ForecasterSpec:
    """Sizes of a forecaster: context_length and max_horizon in values, bins, and the Llama network's widths."""

    context_length: int = 512
    max_horizon: int = 192
    vocab_size: int = 1024
    limit: float = 10.0
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 5
    head_dim: int = 32

    @property
    def tokenizer(self) -> ValueTokenizer:
        return ValueTokenizer(self.vocab_size, self.limit)

    @property
    def max_length(self) -> int:
        return self.context_length + self.max_horizon

    def build(self) -> LlamaForCausalLM:
        """A freshly initialised network (Llama architecture, tied embeddings)."""
        # here, as whoever searches a remote model builds none
        from transformers import (
            LlamaConfig,
            LlamaForCausalLM,
        )

        heads = self.hidden_size // self.head_dim
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                head_dim=self.head_dim,
                max_position_embeddings=self.max_length,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                tie_word_embeddings=True,
                pad_token_id=PAD,
                bos_token_id=None,
                eos_token_id=EOS,
            )
        )

    def save(self, directory: Path) -> None:
        """Write the spec as JSON, whole or not at all; ResultsError when the disk refuses."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        write_text(directory / SPEC_FILE, text)

    @classmethod
    def load(cls, directory: Path) -> ForecasterSpec:
        """The spec saved in a directory; CheckpointError when it is missing, foreign or malformed."""
        path = directory / SPEC_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"forecaster: {path} cannot be read ({error}); give a directory saved by us."
            ) from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CheckpointError(
                f"forecaster: {path} is not of format {FORMAT!r}; give a directory saved by us."
            )
        return cls.of(values, f"forecaster: {path}")

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> ForecasterSpec:
        """The spec with these fields; CheckpointError, naming their owner, when they describe no network."""
        try:
            spec = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"{owner} has unknown fields ({error}).") from error
        spec.check(owner)
        return spec

    def check(self, owner: str) -> None:
        """CheckpointError, naming the field, when this describes no network."""
        for name in (field.name for field in fields(self) if field.name != "limit"):
            value = getattr(self, name)
            least = _LEAST.get(name, 1)
            most = _MOST_LAYERS if name == "num_layers" else _MOST
            if type(value) is not int or not least <= value <= most:
                raise CheckpointError(
                    f"{owner}: {name}: {value!r}, allowed: a whole number from {least} to {most}."
                )
        if type(self.limit) not in (int, float) or not 0 < self.limit < math.inf:
            raise CheckpointError(
                f"{owner}: limit: {self.limit!r}, allowed: a finite number above 0."
            )
        if self.head_dim % 2 or self.hidden_size % self.head_dim:
            raise CheckpointError(
                f"{owner}: head_dim: {self.head_dim}, must be even and divide the hidden_size of {self.hidden_size}."
            )


def forecaster_directory(name: str) -> Path | None:
    """The directory of a forecaster called `name` ("bundled" or a path), or None when it is no forecaster's."""
    directory = BUNDLED if name == "bundled" else Path(name)
    return directory if (directory / SPEC_FILE).is_file() else None
