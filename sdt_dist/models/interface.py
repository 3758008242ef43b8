"""Any object with `LLMInterface` as a backend: batched calls fall back to loops over single ones.

See docs/architecture/search.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.rows import RowModel
from sdt_dist.protocols import LLMInterface, PriorLaw

_NO_LIMIT = 1 << 30


class InterfaceModel(RowModel):
    """Adapts an `LLMInterface` object. Each `get_next_token_logits` is one model call and one NFE.

    `max_context` is read from the object when it has the attribute. Whether results repeat is the object's affair:
    `deterministic` is read from it too and taken as True when absent.
    """

    def __init__(self, interface: LLMInterface, cache_bytes: int = 256 << 20) -> None:
        super().__init__(cache_bytes)
        self.interface = interface
        self.vocab_size = int(interface.vocab_size)
        self.max_context = int(getattr(interface, "max_context", _NO_LIMIT))
        self.deterministic = bool(getattr(interface, "deterministic", True))

    def compute_rows(self, sequences: list[tuple[int, ...]]) -> tuple[np.ndarray, list[int]]:
        rows = [self._row(list(sequence)) for sequence in sequences]
        return np.stack(rows), [1] * len(rows)

    def _row(self, sequence: list[int]) -> np.ndarray:
        row = np.asarray(self.interface.get_next_token_logits(sequence), dtype=np.float64)
        if row.shape != (self.vocab_size,) or np.isnan(row).any() or not (row < np.inf).all():
            raise ConfigurationError(
                f"get_next_token_logits: returned shape {row.shape} for vocab_size {self.vocab_size}, or NaN or +inf; "
                "allowed: [V] with finite values or -inf."
            )
        return row


def end_tokens(eos_token_id: int | list[int] | None) -> tuple[int, ...]:
    """The ids that finish a sequence, from the three forms that `eos_token_id` may have."""
    if eos_token_id is None:
        return ()
    return tuple(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else (int(eos_token_id),)


def interface_process(interface: Any, max_new_tokens: int, **law_options: Any) -> TokenProcess:
    """The process of an `LLMInterface` object; `law_options` are sampling_temperature, top_k and top_p."""
    missing = [
        name
        for name in ("get_next_token_logits", "vocab_size", "eos_token_id")
        if not hasattr(interface, name)
    ]
    if missing:
        raise ConfigurationError(
            f"model: {type(interface).__name__} lacks {', '.join(missing)}; give a model from sdt.load_model, or an "
            "object with get_next_token_logits, encode_text, decode_tokens, get_top_k_tokens, eos_token_id, vocab_size."
        )
    law = PriorLaw(
        (0, int(interface.vocab_size)), end_tokens(interface.eos_token_id), **law_options
    )
    return TokenProcess(
        InterfaceModel(interface),
        law,
        max_new_tokens,
        encode_text=getattr(interface, "encode_text", None),
        decode_text=getattr(interface, "decode_tokens", None),
    )
