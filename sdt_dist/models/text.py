"""A tokenizer as a value: text to token ids and back on machines without Transformers.

See docs/architecture/search.md.

It holds the tokenizer's JSON and needs the `tokenizers` library only; it must not import torch or transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sdt_dist.errors import ConfigurationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


@dataclass(frozen=True)
class TextCodec:
    """Encodes and decodes as the tokenizer it was made of.

    tokenizer: its JSON. clean_up: remove the spaces before punctuation that WordPiece decoders leave.
    split_special_tokens: read special tokens in a prompt as plain text.
    """

    tokenizer: str
    clean_up: bool = False
    split_special_tokens: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> TextCodec:
        """The codec of a Transformers tokenizer; ConfigurationError when that has no form in the tokenizers library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigurationError(
                f"model: its {type(tokenizer).__name__} is no fast tokenizer, so other machines cannot use it; "
                "give a model directory with a tokenizer.json."
            )
        forced = getattr(
            tokenizer,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
            False,
        )
        clean_up = tokenizer.clean_up_tokenization_spaces and (
            type(backend.model).__name__ != "BPE" or forced
        )
        split = bool(getattr(tokenizer, "split_special_tokens", False))
        return cls(backend.to_str(), bool(clean_up), split)

    @classmethod
    def load(cls, values: Any) -> TextCodec:
        """The codec with these fields; ConfigurationError when they are no codec's."""
        try:
            codec = cls(**values)
            codec.encode("")
        except Exception as error:
            raise ConfigurationError(
                f"model card: its tokenizer cannot be read ({error})."
            ) from error
        return codec

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds."""
        return self._backend.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, without special tokens."""
        text = self._backend.decode(tokens, skip_special_tokens=True)
        for spaced, clean in _CLEAN_UP if self.clean_up else ():
            text = text.replace(spaced, clean)
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_backend"}

    @cached_property
    def _backend(self) -> Tokenizer:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.split_special_tokens
        return backend
