"""The nouns that everything shares: states, requests, replies, rewards and samples.

See docs/concepts/target.md, docs/architecture/search.md.

A search never calls a model. It is a generator that yields batches of requests; a driver merges the
requests of many problems and asks a `Process`. A `TokenProcess` answers through a `LogitsModel`, the
batched backend contract; any object with the five members of `LLMInterface` is adapted to that.
This module must not import torch, ray, or any backend.

Axes: B requests of one call, K children, V vocabulary, n generated tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from sdt_dist.parts import Context, Form

FinishReason = Literal["eos", "length"]


@runtime_checkable
class LLMInterface(Protocol):
    """The small synchronous contract that anyone can implement; such a model can be searched as it is."""

    eos_token_id: int | list[int] | None
    vocab_size: int

    def get_next_token_logits(self, token_sequence: list[int]) -> np.ndarray: ...

    def encode_text(self, text: str) -> list[int]: ...

    def decode_tokens(self, tokens: list[int]) -> str: ...

    def get_top_k_tokens(self, sequence: list[int], k: int) -> list[tuple[int, float]]: ...


@dataclass(frozen=True, slots=True)
class PriorLaw:
    """The one definition of p(.|s) that rollouts and expansions share (docs/concepts/target.md).

    `allowed` is the half-open token range [low, high) a process can emit, `end_tokens` the ids that finish
    a sequence (they must lie in `allowed` to be possible). Everything else is masked and p renormalised.
    Order: mask, divide logits by `sampling_temperature`, then top_k, then top_p.
    """

    allowed: tuple[int, int]
    end_tokens: tuple[int, ...] = ()
    sampling_temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """One problem's starting state: the prompt's token ids, a digest of them for caches, and decode data.

    paid: its search has paid for the prompt's distribution before; a backend that has to encode the prompt again, after an
    eviction or in the place of a server that died, bills recomputed tokens and no NFE (docs/concepts/exactness.md#cost).
    embeddings [n, hidden] float32: what stands for the prompt's first n tokens, which are then placeholders; only some
    backends take them, and only in this process. The digest must cover them.
    """

    prompt: tuple[int, ...]
    digest: bytes
    meta: Any = None
    paid: bool = False
    embeddings: np.ndarray | None = None


def prompt_digest(prompt: Sequence[int]) -> bytes:
    """16 bytes that name a prompt in caches, the same in every process."""
    return hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=16).digest()


State = tuple[Root, tuple[int, ...]]  # a problem and the tokens generated so far


class Flow(Protocol):
    """A learned estimate F(s) of the soft value V(s), any at all: searches that use it stay exact (docs/concepts/flow.md).

    `identity` names this very version; a search keeps the version that it started with. States are (root, generated
    tokens), B of them a call; both methods return lambda-dependent estimates for the given inverse_temperature lambda.
    """

    @property
    def identity(self) -> str: ...

    def log_tilts(
        self, states: Sequence[State], inverse_temperature: float, log_prob: np.ndarray
    ) -> np.ndarray:
        """lambda F(s a) [B, V] float64 of the children of B states, finite wherever p(a|s) > 0; log_prob [B, V]: log p(a|s)."""
        ...

    def values(self, states: Sequence[State], inverse_temperature: float) -> np.ndarray:
        """F(s) [B] float64."""
        ...


@dataclass(frozen=True, slots=True)
class Tilt:
    """Report q(a|s) ~ p(a|s) exp(lambda F(s a)) beside p, and draw tokens from the law `draws` (docs/concepts/flow.md#proposal).

    flow: the identity of a flow that the backend holds. Excluded tokens are masked under both laws.
    """

    flow: str
    inverse_temperature: float
    draws: Literal["p", "q"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request cost (docs/concepts/exactness.md#cost). `calls` holds the numbers of the forward passes it took part in."""

    nfe: int = 0
    calls: frozenset[int] = frozenset()
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ExpandRequest:
    """Children of the state (root, tokens): the `num_children` largest of log p, or of log p + Gumbel(key).

    With `key` (a row key, see `noise`) the children are a draw from p without replacement, in order. Tokens
    in `excluded` are masked before choosing; reported log-probs are always those of the unmasked law.
    With a `tilt` that draws from q, q stands for p in choosing.
    """

    kind: ClassVar[Literal["expand"]] = "expand"
    is_single_step: ClassVar[bool] = True  # one forward pass answers it

    root: Root
    tokens: tuple[int, ...]
    num_children: int
    key: int | None = None
    excluded: tuple[int, ...] = ()
    tilt: Tilt | None = None


@dataclass(frozen=True, slots=True)
class Expansion:
    """Children [K] of a state with log p(a|s) and the log-weight they carry in backups (docs/concepts/target.md).

    `log_residual` is the log of the prior mass outside children and excluded tokens (-inf when none), summed
    over those tokens rather than taken as 1 - P; `num_remaining` counts the tokens with p > 0 there.
    Where the request had a tilt: log_proposal [K] is log q, log_residual_proposal the log of the mass of q outside children
    and excluded tokens, log_tilt [K] lambda F of each child.
    """

    kind: ClassVar[Literal["expand"]] = "expand"

    children: np.ndarray
    log_prob: np.ndarray
    log_weight: np.ndarray
    log_residual: float
    num_remaining: int
    cost: Cost = field(default_factory=Cost)
    log_proposal: np.ndarray | None = None
    log_residual_proposal: float | None = None
    log_tilt: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Generate up to `num_tokens` tokens from the state (root, tokens), stopping after an end token.

    Step j uses the row key `key + j * golden` (`noise.position_key`): give the key of the first new position.
    `key=None` takes the argmax (greedy). `excluded` is masked at the first step only. Draws are from p, or from the law
    that `tilt` names; p and q have separate noise.
    """

    kind: ClassVar[Literal["rollout"]] = "rollout"

    root: Root
    tokens: tuple[int, ...]
    num_tokens: int
    key: int | None
    excluded: tuple[int, ...] = ()
    tilt: Tilt | None = None

    @property
    def is_single_step(self) -> bool:
        """Whether one forward pass answers it."""
        return self.num_tokens == 1


@dataclass(frozen=True, slots=True)
class Rollout:
    """Generated tokens [n] (an end token included) with what a tree needs to know of every step.

    log_prob [n]: log p of each token under the unmasked law. log_residual [n]: log prior mass outside that
    token (outside it and `excluded` at step 0). num_remaining [n]: how many tokens with p > 0 are there.
    Where the request had a tilt, whichever law it drew from: log_proposal [n] and log_residual_proposal [n] are the same
    of q, and log_tilt [n] is lambda F of every state that was reached.
    """

    kind: ClassVar[Literal["rollout"]] = "rollout"

    tokens: np.ndarray
    log_prob: np.ndarray
    log_residual: np.ndarray
    num_remaining: np.ndarray
    finish_reason: FinishReason
    cost: Cost = field(default_factory=Cost)
    log_proposal: np.ndarray | None = None
    log_residual_proposal: np.ndarray | None = None
    log_tilt: np.ndarray | None = None


ModelRequest = ExpandRequest | RolloutRequest
ModelReply = Expansion | Rollout


class ModelFacts(Protocol):
    """What is known of a backend without calling it; `LogitsModel` says what each means."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    @property
    def deterministic(self) -> bool: ...


class LogitsModel(Protocol):
    """A batched next-token backend. KV caches, padding and batching stay inside it (docs/architecture/search.md).

    `nfe` and `model_calls` count, since construction, every next-token distribution computed (rows of the
    output head that were used, the prompt's last position included) and every batched forward pass.
    Errors: ContextError for an empty prompt or one that leaves no room within `max_context`; ConfigurationError for a
    tilt by a flow that the backend does not hold. Those that can hold flows have `load_flow(flow)` and
    `drop_flow(identity)` besides.
    """

    vocab_size: int
    max_context: int
    deterministic: bool
    nfe: int
    model_calls: int

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> list[Expansion]: ...

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]: ...

    def release(self, root: Root) -> None:
        """Forget what is cached for a problem; called when its search ends."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A finished answer as users see it: tokens without the end token, and its text or its series [horizon]."""

    tokens: tuple[int, ...]
    text: str | None = None
    series: np.ndarray | None = None


class States(Protocol):
    """How the states of a generative model read: what they start from, when they are finished, what they say.

    It answers without a model, so that a search can run where its model is not.
    """

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def deterministic(self) -> bool: ...

    @property
    def top_k(self) -> int | None: ...

    @property
    def takes(self) -> tuple[Form, ...]:
        """The forms of context that it can continue."""
        ...

    @property
    def sample_view(self) -> Form:
        """What of a sample a plain function is given as a reward."""
        ...

    def root(self, context: Context) -> Root: ...

    def is_finished(self, tokens: Sequence[int]) -> bool: ...

    def finish_reason(self, tokens: Sequence[int]) -> FinishReason: ...

    def decode(self, root: Root, sequences: Sequence[tuple[int, ...]]) -> list[Decoded]: ...


class ModelCalls(Protocol):
    """The transitions of a generative model: what has to be asked of it."""

    def expand(self, requests: Sequence[ExpandRequest]) -> list[Expansion]: ...

    def rollout(self, requests: Sequence[RolloutRequest]) -> list[Rollout]: ...

    def load_flow(self, flow: Flow) -> None: ...

    def release(self, root: Root) -> None: ...


class Process(States, ModelCalls, Protocol):
    """What search sees of a generative model in this process: its states, and its calls."""


class Reward(Protocol):
    """Scores finished samples of ONE problem; sees context and sample only, never the truth (docs/guides/rewards.md)."""

    def score(self, samples: Sequence[Decoded]) -> np.ndarray:
        """Rewards [B] float64, finite; RewardError names the reward and the sample otherwise."""
        ...

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        """Raw terms [B] by name, before their multipliers; score = sum of multipliers[name] * term."""
        ...

    @property
    def multipliers(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """One finished sample with its own reward and its log-probability under p (end token included)."""

    tokens: tuple[int, ...]
    reward: float
    log_prob: float
    finish_reason: FinishReason
    text: str | None = None
    series: np.ndarray | None = None
    components: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Sample: {self}>"

    def __str__(self) -> str:
        """One line: the reward, log p, how many tokens, and the text's beginning or the range of the values."""
        words = f"reward {self.reward:.4g}, log p {self.log_prob:.4g}, {len(self.tokens)} tokens ({self.finish_reason})"
        if self.text is not None:
            return f"{words}, text {_beginning(self.text)!r}"
        if self.series is None or not len(self.series):
            return words
        return f"{words}, values {self.series.min():.4g} to {self.series.max():.4g}"


def _beginning(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
