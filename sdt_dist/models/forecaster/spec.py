"""What defines a forecaster besides its weights, and how its network is built."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from sdt_dist.errors import CheckpointError
from sdt_dist.models.forecaster.tokenizer import EOS, PAD, ValueTokenizer

FORMAT = "sdt-forecaster/1"
SPEC_FILE = "forecaster.json"


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
        (directory / SPEC_FILE).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> ForecasterSpec:
        """The spec saved in a directory; CheckpointError when it is missing, foreign or malformed."""
        path = directory / SPEC_FILE
        try:
            fields = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"forecaster: {path} cannot be read ({error}); give a directory saved by us."
            ) from error
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise CheckpointError(f"forecaster: {path} is not of format {FORMAT!r}; give a directory saved by us.")
        try:
            return cls(**fields)
        except TypeError as error:
            raise CheckpointError(f"forecaster: {path} has unknown fields ({error}).") from error
