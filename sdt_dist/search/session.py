"""One problem's search under way: its budget, its cost, and every finished sample with its own reward.

Methods are generators over `Session` helpers; each `yield` hands requests to the driver and receives replies in
the same order. Nothing here calls a model or a reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from sdt_dist.noise import stream_key
from sdt_dist.protocols import (
    Cost,
    Decoded,
    ExpandRequest,
    Expansion,
    FinishReason,
    Process,
    Reward,
    Rollout,
    RolloutRequest,
    Root,
    Sample,
)
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.result import SearchCost, SearchResult
from sdt_dist.search.tree import Tree


@dataclass(frozen=True, slots=True)
class SearchProblem:
    """One thing to search: `index` is its identity for seeds, `reward` scores its finished samples."""

    index: int
    root: Root
    reward: Reward


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Ask the reward for finished token sequences (end token included); `partial` asks its partial form."""

    sequences: list[tuple[int, ...]]
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards [B], their raw components by name [B], and the decoded answers."""

    rewards: np.ndarray
    components: dict[str, np.ndarray]
    decoded: list[Decoded]


Request = ExpandRequest | RolloutRequest | ScoreRequest
Reply = Expansion | Rollout | Scores
Ask = Generator[list[Request], list[Reply], list[Reply]]


@dataclass
class Session:
    """State that every method shares for one problem."""

    problem: SearchProblem
    process: Process
    options: SearchOptions
    seed: int
    clock: Callable[[], float] = time.monotonic
    nfe: int = 0
    calls: set[int] = field(default_factory=set)
    recomputed_tokens: int = 0
    rollouts: int = 0
    reward_calls: int = 0
    wall_s: float = 0.0
    finished: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._index: dict[tuple[int, ...], int] = {}

    @property
    def root(self) -> Root:
        return self.problem.root

    def key(self, *parts: int | str) -> int:
        """A stream key of this problem (SPEC section 1: seed, problem, then what the draw belongs to)."""
        return stream_key(self.seed, self.problem.index, *parts)

    def rng(self, purpose: str) -> np.random.Generator:
        """A numpy generator for a purpose that is not a draw from p, such as the final resampling."""
        return np.random.default_rng(self.key(purpose))

    def ask(self, requests: Sequence[ExpandRequest | RolloutRequest]) -> Ask:
        """Send model requests and count what they cost."""
        replies = yield list(requests)
        for reply in replies:
            self._pay(reply.cost)  # type: ignore[union-attr]
        return replies

    def roll_out(self, requests: Sequence[RolloutRequest]) -> Generator[list[Request], list[Reply], list[Rollout]]:
        """`ask` for rollouts only."""
        replies = (yield from self.ask(requests)) if requests else []
        return cast(list[Rollout], replies)

    def _pay(self, cost: Cost) -> None:
        self.nfe += cost.nfe
        self.calls |= cost.calls
        self.recomputed_tokens += cost.recomputed_tokens

    def score(
        self, sequences: Sequence[tuple[int, ...]], log_probs: Sequence[float], reasons: Sequence[FinishReason]
    ) -> Generator[list[Request], list[Reply], list[int]]:
        """Indices into `finished` of these sequences; only those never seen before reach the reward."""
        new: dict[tuple[int, ...], int] = {}
        for position, sequence in enumerate(sequences):
            if sequence not in self._index and sequence not in new:
                new[sequence] = position
        if new:
            (scores,) = yield [ScoreRequest(list(new))]
            assert isinstance(scores, Scores)
            self.reward_calls += len(new)
            for row, (sequence, position) in enumerate(new.items()):
                self._index[sequence] = len(self.finished)
                self.finished.append(_sample(scores, row, float(log_probs[position]), reasons[position]))
        return [self._index[sequence] for sequence in sequences]

    def score_partial(self, sequences: list[tuple[int, ...]]) -> Generator[list[Request], list[Reply], np.ndarray]:
        """The reward's partial form of unfinished sequences [B]."""
        (scores,) = yield [ScoreRequest(sequences, partial=True)]
        assert isinstance(scores, Scores)
        return scores.rewards

    def index_of(self, sequence: tuple[int, ...]) -> int:
        """Index into `finished` of a token sequence (end token included) that was scored."""
        return self._index[sequence]

    def rewards(self, indices: Sequence[int]) -> np.ndarray:
        """Rewards [B] of finished samples."""
        return np.array([self.finished[i].reward for i in indices], dtype=np.float64)

    def next_wave(self, wave_size: int) -> int:
        """How many rollouts to start now; 0 when the budget is spent (SPEC 1.3: within one wave)."""
        options = self.options
        if options.time_budget_s is not None and self.rollouts and self.elapsed_s() >= options.time_budget_s:
            return 0
        allowed = wave_size
        if options.rollout_limit is not None:
            allowed = min(allowed, options.rollout_limit - self.rollouts)
        if options.max_nfe is not None:
            typical = self.nfe / self.rollouts if self.rollouts else self.process.max_new_tokens
            left = (options.max_nfe - self.nfe) / max(typical, 1.0)
            allowed = min(allowed, round(left) if self.rollouts else max(round(left), 1))
        return max(allowed, 0)

    def elapsed_s(self) -> float:
        return self.clock() - self._started

    def cost(self) -> SearchCost:
        """The counters so far; wall_s is this problem's equal share of the rounds in which it took part."""
        return SearchCost(
            self.nfe, len(self.calls), self.rollouts, self.reward_calls, self.recomputed_tokens, self.wall_s
        )

    def best(self) -> Sample:
        """The finished sample with the largest reward, the earliest on ties."""
        return max(self.finished, key=lambda sample: sample.reward)

    def result(
        self,
        method: str,
        chosen: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        probabilities: np.ndarray | None = None,
        tree: Tree | None = None,
        **fields: Any,
    ) -> SearchResult:
        """The result whose samples are finished[chosen]; `probabilities` [S] is the law they were drawn from."""
        return SearchResult(
            method=method,
            seed=self.seed,
            samples=[self.finished[i] for i in chosen],
            weights=[1.0 / len(chosen)] * len(chosen) if weights is None else list(weights),
            best=self.best(),
            finished=list(self.finished),
            cost=self.cost(),
            deterministic=self.process.deterministic,
            tree_stats={} if tree is None else tree.stats() | {"rollouts": float(self.rollouts)},
            tree=tree,
            probabilities=probabilities,
            **fields,
        )


def _sample(scores: Scores, row: int, log_prob: float, reason: FinishReason) -> Sample:
    decoded = scores.decoded[row]
    return Sample(
        tokens=decoded.tokens,
        reward=float(scores.rewards[row]),
        log_prob=log_prob,
        finish_reason=reason,
        text=decoded.text,
        series=decoded.series,
        components={name: float(term[row]) for name, term in scores.components.items()},
    )
