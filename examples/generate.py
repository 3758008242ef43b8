"""Text from a language model of one's own, tilted towards a pattern; nothing is downloaded.

    python examples/generate.py

Any object with the members of `sdt_dist.LLMInterface` can be searched as it is. This one is a bigram
model of words: the next word depends on the last one alone.
"""

from __future__ import annotations

import numpy as np

import sdt_dist as sdt
from sdt_dist.rewards.text import Regex

TEXT = """
the cat sat on the mat . the dog sat on the rug . the cat saw the dog . a dog ran to the cat .
a bird sang on the mat . the bird saw a cat . the dog ran . a cat ran to the rug . the bird sang .
"""


class Bigrams:
    """Counts of pairs of words; a sentence ends with the full stop."""

    def __init__(self, text: str) -> None:
        words = text.split()
        self.words = sorted(set(words))
        self.vocab_size = len(self.words)
        self.eos_token_id = self.words.index(".")
        self.counts = np.zeros((self.vocab_size, self.vocab_size))
        tokens = self.encode_text(text)
        np.add.at(self.counts, (tokens[:-1], tokens[1:]), 1.0)

    def get_next_token_logits(self, token_sequence: list[int]) -> np.ndarray:
        """log p of the next word [vocab_size], up to a constant; -inf for one that never followed."""
        with np.errstate(divide="ignore"):
            return np.log(self.counts[token_sequence[-1]])

    def get_top_k_tokens(self, sequence: list[int], k: int) -> list[tuple[int, float]]:
        logits = self.get_next_token_logits(sequence)
        return [(int(token), float(logits[token])) for token in np.argsort(-logits)[:k]]

    def encode_text(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split()]

    def decode_tokens(self, tokens: list[int]) -> str:
        return " ".join(self.words[token] for token in tokens)


result = sdt.search(
    Bigrams(TEXT),
    "the",
    Regex("dog.*cat"),
    method="residual_ts",
    inverse_temperature=4.0,
    max_new_tokens=10,
    num_rollouts=200,
    num_samples=6,
)
print(result)
for sample in result.samples:
    print(f"reward {sample.reward:.0f}: the {sample.text}")
