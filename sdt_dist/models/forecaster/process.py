"""A forecaster's states as search sees them: the root tokenises the history, decoding un-scales.

See docs/architecture/search.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.forecaster.spec import ForecasterSpec
from sdt_dist.models.forecaster.tokenizer import FIRST_BIN
from sdt_dist.models.process import ModelProcess, check_law
from sdt_dist.parts import Form, SeriesPart, as_context, only_part
from sdt_dist.protocols import Decoded, LogitsModel, ModelFacts, PriorLaw, Root, prompt_digest


class ForecastStates:
    """Exactly `horizon` bin tokens after a history; PAD and EOS are masked, which is part of the prior."""

    def __init__(
        self,
        facts: ModelFacts,
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
        check_law(law, facts.vocab_size)
        self.facts = facts
        self.law = law
        self.max_new_tokens = horizon
        self.spec = spec

    @property
    def takes(self) -> tuple[Form, ...]:
        """The forms of context that it can continue."""
        return ("series",)

    @property
    def sample_view(self) -> Form:
        """What of a sample a plain function is given as a reward."""
        return "series"

    @property
    def are_tokens_ordered(self) -> bool:
        """Whether tokens are values, neighbours next to each other."""
        return True

    @property
    def context_length(self) -> int | None:
        """How many of a series' last values count."""
        return self.spec.context_length

    @property
    def deterministic(self) -> bool:
        return self.facts.deterministic

    @property
    def top_k(self) -> int | None:
        """The law's top_k: to how many most probable tokens p is cut, or None."""
        return self.law.top_k

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

    def is_finished(self, tokens: Sequence[int]) -> bool:
        return len(tokens) >= self.max_new_tokens

    def finish_reason(self, tokens: Sequence[int]) -> Literal["length"]:
        """Why a finished state ended: always its length, as no token ends a series."""
        return "length"

    def decode(self, root: Root, sequences: Sequence[tuple[int, ...]]) -> list[Decoded]:
        """Series in the units of the history; works for unfinished sequences too (shorter series)."""
        decode = self.spec.tokenizer.decode
        return [
            Decoded(tuple(s), series=decode(np.array(s, dtype=np.int64), root.meta))
            for s in sequences
        ]


class Forecaster:
    """A loaded forecaster: `process(horizon)` gives what search works on, `model` the backend behind it."""

    sample_view: Form = "series"

    def __init__(self, model: LogitsModel, spec: ForecasterSpec) -> None:
        self.model = model
        self.spec = spec

    def process(self, max_new_tokens: int, **law_options: Any) -> ModelProcess:
        """The process for a horizon; `law_options` are sampling_temperature, top_k and top_p of p."""
        states = ForecastStates(self.model, self.spec, max_new_tokens, **law_options)
        return ModelProcess(states, self.model)

    def card_spec(self) -> tuple[str, dict[str, Any]]:
        """What a card says of it: the name of its kind, and that kind's spec."""
        return "forecaster", asdict(self.spec)
