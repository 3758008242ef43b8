"""Values to tokens and back: standardise by the context's mean and std, then uniform bins.

See docs/guides/backends.md#bundled-forecaster.

After Chronos (Ansari et al. 2024, arXiv 2403.07815, section 3.1), with mean subtraction, so that a series far from
zero keeps its resolution. Token 0 is PAD, 1 is EOS, tokens 2 to V-1 are bins of [-limit, limit].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdt_dist.data.scale import Scale, fit_scale

PAD = 0
EOS = 1
FIRST_BIN = 2


@dataclass(frozen=True, slots=True)
class ValueTokenizer:
    """Uniform bins: vocab_size V including PAD and EOS, centres from -limit to limit in standard deviations."""

    vocab_size: int = 1024
    limit: float = 10.0

    @property
    def num_bins(self) -> int:
        return self.vocab_size - FIRST_BIN

    @property
    def bin_width(self) -> float:
        """Distance of two neighbouring centres, in standard deviations of the context."""
        return 2 * self.limit / (self.num_bins - 1)

    def encode(self, history: np.ndarray) -> tuple[np.ndarray, Scale]:
        """Tokens [L] int64 of a history [L] and its scale. ContextError for a history that cannot be scaled."""
        scale = fit_scale(history)
        return self.tokens((np.asarray(history, dtype=np.float64) - scale.loc) / scale.scale), scale

    def tokens(self, standardised: np.ndarray) -> np.ndarray:
        """Tokens of standardised values; values beyond the limit take the outermost bin."""
        bins = np.rint(
            (np.clip(standardised, -self.limit, self.limit) + self.limit) / self.bin_width
        )
        return bins.astype(np.int64) + FIRST_BIN

    def decode(self, tokens: np.ndarray, scale: Scale) -> np.ndarray:
        """Values, in the user's units, of bin tokens of any shape."""
        centres = (np.asarray(tokens, dtype=np.float64) - FIRST_BIN) * self.bin_width - self.limit
        return scale.loc + scale.scale * centres
