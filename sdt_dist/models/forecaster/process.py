"""A forecaster as search sees it: the root tokenises the history, decoding un-scales.

See docs/architecture/search.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.forecaster.spec import ForecasterSpec
from sdt_dist.models.forecaster.tokenizer import FIRST_BIN
from sdt_dist.models.process import TokenProcess
from sdt_dist.parts import Form, SeriesPart, as_context, only_part
from sdt_dist.protocols import Decoded, LogitsModel, PriorLaw, Root, prompt_digest


class ForecastProcess(TokenProcess):
    """Exactly `horizon` bin tokens after a history; PAD and EOS are masked, which is part of the prior."""

    def __init__(
        self,
        model: LogitsModel,
        spec: ForecasterSpec,
        horizon: int,
        *,
        sampling_temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        if not 1 <= horizon <= spec.max_horizon:
            raise ConfigurationError(
                f"horizon: {horizon}, allowed 1 to {spec.max_horizon} for this forecaster."
            )
        law = PriorLaw((FIRST_BIN, spec.vocab_size), (), sampling_temperature, top_k, top_p)
        super().__init__(model, law, horizon)
        self.spec = spec

    @property
    def takes(self) -> tuple[Form, ...]:
        return ("series",)

    def root(self, context: Any) -> Root:
        """The root of a series [L], the history, of which the last context_length values count.

        ContextError when those are too few, not finite or constant, and for a context of another form.
        """
        part = only_part(as_context(context, self.takes), self.takes)
        assert isinstance(part, SeriesPart)
        history = np.asarray(part.values, dtype=np.float64)
        tokens, scale = self.spec.tokenizer.encode(
            history[-self.spec.context_length :] if history.ndim == 1 else history
        )
        prompt = tuple(tokens.tolist())
        return Root(prompt, prompt_digest(prompt), scale)

    def decode(self, root: Root, sequences: Sequence[tuple[int, ...]]) -> list[Decoded]:
        """Series in the units of the history; works for unfinished sequences too (shorter series)."""
        decode = self.spec.tokenizer.decode
        return [
            Decoded(tuple(s), series=decode(np.array(s, dtype=np.int64), root.meta))
            for s in sequences
        ]


class Forecaster:
    """A loaded forecaster: `process(horizon)` gives what search works on, `model` the backend behind it."""

    is_forecaster = True

    def __init__(self, model: LogitsModel, spec: ForecasterSpec) -> None:
        self.model = model
        self.spec = spec

    def process(self, max_new_tokens: int, **law_options: Any) -> ForecastProcess:
        """The process for a horizon; `law_options` are sampling_temperature, top_k and top_p of p."""
        return ForecastProcess(self.model, self.spec, max_new_tokens, **law_options)
