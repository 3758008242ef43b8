"""`VllmModel`: a LogitsModel over a vLLM engine (docs/architecture/search.md).

A prompt's last row is computed once and kept, as the other backends do; whatever starts at the root is chosen from it here.
Everything else is native generation in the engine, which caches prefixes by blocks of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GenerationConfig, PretrainedConfig

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.context import check_context
from sdt_dist.models.reduction import draw, largest, law_scores
from sdt_dist.models.vllm.engine import Answer, Ask, Engine
from sdt_dist.models.vllm.processor import DRAW, Instructions
from sdt_dist.noise import position_key
from sdt_dist.protocols import (
    Cost,
    ExpandRequest,
    Expansion,
    PriorLaw,
    Rollout,
    RolloutRequest,
    Root,
)

_ANY = PriorLaw((0, 1))  # the law of rows that are sent whole is not looked at
_Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # as `reduction.draw` gives them


@dataclass(slots=True)
class _Way:
    """One request's way: pieces of what was drawn for it, in order, what it cost, and for an expansion its row."""

    root: Root
    logits: np.ndarray  # [V] after the prompt
    reused: int  # positions of prompt and known tokens that needed no computing, unless the engine says otherwise
    drawn: list[_Drawn] = field(default_factory=list)
    kept: tuple[np.ndarray, np.ndarray, float, int] | None = None
    nfe: int = 0
    recomputed: int = 0
    steps: frozenset[int] = frozenset()

    def tokens(self) -> list[int]:
        return [token for piece in self.drawn for token in piece[0].tolist()]

    def cost(self) -> Cost:
        return Cost(self.nfe, self.steps, self.recomputed)

    def expansion(self) -> Expansion:
        assert self.kept is not None
        tokens, log_prob, residual, count = self.kept
        return Expansion(tokens, log_prob, log_prob, residual, count, self.cost())

    def rollout(self, law: PriorLaw) -> Rollout:
        nothing = (np.empty(0, np.int32), np.empty(0), np.empty(0), np.empty(0, np.int32))
        columns = (np.concatenate(pieces) for pieces in zip(nothing, *self.drawn, strict=True))
        tokens, log_prob, residual, count = columns
        ended = len(tokens) > 0 and int(tokens[-1]) in law.end_tokens
        return Rollout(tokens, log_prob, residual, count, "eos" if ended else "length", self.cost())


class VllmModel:
    """Batched scoring and rollouts; counters and errors as in `protocols.LogitsModel`, and ModelGoneError.

    `prefix_tokens` and `reused_tokens` count positions that requests needed and those that the engine had cached.
    Only seeds are promised, not bits. Calls may come from several threads.
    """

    deterministic = False
    concurrent_calls = 4

    def __init__(
        self, engine: Engine, directory: Path, config: PretrainedConfig, *, keep: Any = None
    ) -> None:
        self._keep = keep
        self.engine = engine
        self._directory = directory
        self._config = config
        settings = engine.llm.model_config
        self.vocab_size = settings.get_vocab_size()
        self.max_context = settings.max_model_len
        self._embeddings = settings.enable_prompt_embeds
        self.nfe = self.recomputed_tokens = self.prefix_tokens = self.reused_tokens = 0
        self._first_step = engine.steps
        self._roots: dict[
            bytes, Future[np.ndarray]
        ] = {}  # by digest, the logits [V] after the prompt
        self._lock = threading.Lock()

    @property
    def model_calls(self) -> int:
        """The engine's forward passes since this model was made."""
        return self.engine.steps - self._first_step

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> list[Expansion]:
        _refuse_tilts(requests)
        ways = self._begin([(request.root, request.tokens, 1) for request in requests])
        at_root = [i for i, request in enumerate(requests) if not request.tokens]
        if at_root:
            scores = law_scores(np.stack([ways[i].logits for i in at_root]), law)
            asked = [requests[i] for i in at_root]
            found = largest(
                scores,
                [r.num_children for r in asked],
                [r.key for r in asked],
                [r.excluded for r in asked],
            )
            for i, columns in zip(at_root, found, strict=True):
                ways[i].kept = columns
        asks = {
            i: self._ask(request.root, request.tokens, 1, request.num_children, request, law)
            for i, request in enumerate(requests)
            if request.tokens
        }
        answers = self._run(ways, asks)
        self._count_prefixes(ways, requests, answers)
        for i, answer in answers.items():
            ways[i].kept = answer.kept()
        return [way.expansion() for way in ways]

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]:
        _refuse_tilts(requests)
        ways = self._begin(
            [(request.root, request.tokens, request.num_tokens) for request in requests]
        )
        self._draw_at_roots(ways, requests, law)
        asks: dict[int, Ask] = {}
        for i, (way, request) in enumerate(zip(ways, requests, strict=True)):
            drawn = way.tokens()
            left = request.num_tokens - len(drawn)
            if left and not (drawn and drawn[-1] in law.end_tokens):
                onward = replace(
                    request,
                    key=None if request.key is None else position_key(request.key, len(drawn)),
                    excluded=() if drawn else request.excluded,
                )
                asks[i] = self._ask(
                    request.root, (*request.tokens, *drawn), left, DRAW, onward, law
                )
        answers = self._run(ways, asks)
        self._count_prefixes(ways, requests, answers)
        for i, answer in answers.items():
            ways[i].drawn.append(answer.drawn())
        return [way.rollout(law) for way in ways]

    def release(self, root: Root) -> None:
        with self._lock:
            self._roots.pop(root.digest, None)

    def reference_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [V] float32 after a sequence, past the prefix cache."""
        (answer,) = self.engine.run([self._whole_row(Root(tuple(tokens), b""), fresh=True)])
        return _only(answer)

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """What ends a sequence by the model's own generation settings."""
        try:
            return GenerationConfig.from_pretrained(self._directory).eos_token_id
        except OSError:
            return self._config.eos_token_id

    def config_values(self) -> dict[str, Any]:
        """The configuration where it differs from its defaults."""
        return self._config.to_diff_dict()

    def named_weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Label and bytes [n] uint8 of every weight file, in order."""
        for path in sorted(self._directory.glob("*.safetensors")):
            yield path.name, np.memmap(path, dtype=np.uint8, mode="r")

    def forgetful_copy(self) -> VllmModel:
        """A model on the same engine with counters of its own, before which the engine forgets its prefixes."""
        self.engine.reset_prefix_cache()
        return VllmModel(self.engine, self._directory, self._config, keep=self._keep)

    def close(self) -> None:
        """End the engine."""
        self.engine.close()

    def _begin(self, states: Sequence[tuple[Root, tuple[int, ...], int]]) -> list[_Way]:
        """Ways of checked requests; prompts that are new are encoded, and paid for by who needs them first."""
        for root, known, num_tokens in states:
            check_context(
                root, len(known) + num_tokens, self.max_context, embeddings=self._embeddings
            )
        with self._lock:
            roots = {root.digest: root for root, *_ in reversed(states)}
            new = {digest: root for digest, root in roots.items() if digest not in self._roots}
            self._roots |= {digest: Future() for digest in new}
            rows = {digest: self._roots[digest] for digest in roots}
        answers = self._encode(new, rows)
        ways = [_Way(root, rows[root.digest].result(), len(root.prompt)) for root, *_ in states]
        for way in ways:
            root = way.root
            answer = answers.pop(way.root.digest, None)
            if answer is not None:
                self._pay(
                    way, answer, nfe=int(not root.paid), again=len(root.prompt) if root.paid else 0
                )
                way.reused = answer.num_cached
        return ways

    def _encode(
        self, roots: dict[bytes, Root], rows: dict[bytes, Future[np.ndarray]]
    ) -> dict[bytes, Answer]:
        """The answers for prompts that are new; their last rows also go to `rows`, where other callers may wait."""
        if not roots:
            return {}
        try:
            answers = self.engine.run([self._whole_row(root) for root in roots.values()])
        except BaseException as error:
            with self._lock:
                for digest in roots:
                    self._roots.pop(digest, None)
            for digest in roots:
                rows[digest].set_exception(error)
            raise
        for digest, answer in zip(roots, answers, strict=True):
            rows[digest].set_result(_only(answer))
        return dict(zip(roots, answers, strict=True))

    def _draw_at_roots(
        self, ways: list[_Way], requests: Sequence[RolloutRequest], law: PriorLaw
    ) -> None:
        """First tokens of the rollouts that start at a root."""
        places = [
            i for i, request in enumerate(requests) if not request.tokens and request.num_tokens
        ]
        if not places:
            return
        scores = law_scores(np.stack([ways[i].logits for i in places]), law)
        columns = draw(
            scores, [requests[i].key for i in places], [requests[i].excluded for i in places]
        )
        for at, i in enumerate(places):
            ways[i].drawn.append(tuple(column[at : at + 1] for column in columns))  # type: ignore[arg-type]

    def _ask(
        self,
        root: Root,
        known: tuple[int, ...],
        num_tokens: int,
        children: int,
        request: ExpandRequest | RolloutRequest,
        law: PriorLaw,
    ) -> Ask:
        instructions = Instructions(
            self.engine.number(), children, request.key, request.excluded, law
        )
        return Ask([*root.prompt, *known], num_tokens, instructions, root.embeddings)

    def _whole_row(self, root: Root, *, fresh: bool = False) -> Ask:
        instructions = Instructions(self.engine.number(), None, None, (), _ANY)
        return Ask(list(root.prompt), 1, instructions, root.embeddings, fresh)

    def _run(self, ways: list[_Way], asks: dict[int, Ask]) -> dict[int, Answer]:
        """The engine's answers to requests, by their ways, which pay for them."""
        answers = dict(zip(asks, self.engine.run(list(asks.values())), strict=True))
        for i, answer in answers.items():
            again = max(len(asks[i].prompt) - 1 - answer.num_cached, 0)
            self._pay(ways[i], answer, nfe=len(answer.rows), again=again)
        return answers

    def _pay(self, way: _Way, answer: Answer, *, nfe: int, again: int) -> None:
        """Bill an answer: rows computed, and positions that were encoded before and had to be again."""
        steps = frozenset(step - self._first_step for step in answer.steps)
        way.nfe = way.nfe + nfe
        way.recomputed = way.recomputed + again
        way.steps = way.steps | steps
        with self._lock:
            self.nfe = self.nfe + nfe
            self.recomputed_tokens = self.recomputed_tokens + again

    def _count_prefixes(
        self,
        ways: list[_Way],
        requests: Sequence[ExpandRequest | RolloutRequest],
        answers: dict[int, Answer],
    ) -> None:
        """Once a request: the positions of its prompt and known tokens, and how many of them were cached."""
        needed = [len(request.root.prompt) + len(request.tokens) for request in requests]
        cached = [way.reused for way in ways]
        for i, answer in answers.items():
            if requests[i].tokens and ways[i].reused == len(
                requests[i].root.prompt
            ):  # its prompt was not new
                cached[i] = answer.num_cached
        reused = sum(min(pair) for pair in zip(needed, cached, strict=True))
        with self._lock:
            self.prefix_tokens = self.prefix_tokens + sum(needed)
            self.reused_tokens = self.reused_tokens + reused


def _only(answer: Answer) -> np.ndarray:
    assert answer.logits is not None
    return answer.logits


def _refuse_tilts(requests: Sequence[ExpandRequest | RolloutRequest]) -> None:
    if any(request.tilt is not None for request in requests):
        raise ConfigurationError(
            "tilt: given, but the vllm backend holds no flow networks; allowed: None. Use the hf or mlx backend for "
            "searches with a flow."
        )
