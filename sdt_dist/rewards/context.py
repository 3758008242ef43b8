"""What a reward may see of a problem: its context, and never the truth (docs/guides/rewards.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdt_dist.parts import Context, SeriesPart, TextPart


@dataclass(frozen=True, slots=True)
class RewardContext:
    """A problem's history [L] (forecasts) or prompt."""

    history: np.ndarray | None = None
    prompt: str | None = None

    @classmethod
    def of(cls, context: Context) -> RewardContext:
        """What a context shows: its series, where there is one alone, and its texts one after another; token ids are neither."""
        series = [part.values for part in context if isinstance(part, SeriesPart)]
        texts = [part.text for part in context if isinstance(part, TextPart)]
        return cls(
            history=series[0] if len(series) == 1 else None,
            prompt="".join(texts) if texts else None,
        )
