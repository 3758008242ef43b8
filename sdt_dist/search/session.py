"""One problem's search under way: its budget, its cost, and every finished sample with its own reward.

Methods are generators over `Session` helpers; each `yield` hands requests to the driver and receives replies in
the same order. Nothing here calls a model or a reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

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
    Tilt,
    prompt_digest,
)
from sdt_dist.search.blocks import BlockProcess, block_ends
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.result import SearchCost, SearchResult
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.tree.tree import Tree
from sdt_dist.values.records import Membership, Shared, ShareRequest, reward_of


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


Request = ExpandRequest | RolloutRequest | ScoreRequest | ShareRequest
Reply = Expansion | Rollout | Scores | Shared
Ask = Generator[list[Request], list[Reply], list[Reply]]


@dataclass
class Session:
    """State that every method shares for one problem."""

    problem: SearchProblem
    process: Process | BlockProcess
    options: SearchOptions
    seed: int
    clock: Callable[[], float] = time.monotonic
    resumed: Snapshot | None = None
    membership: Membership | None = (
        None  # where several searches work on the problem, or earlier evidence is joined
    )
    flow: str | None = None  # identity of the flow that its method uses; the model holds it
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
        self._earlier_calls = 0
        self._tokens_per_rollout = self.process.max_new_tokens
        if self.resumed is not None:
            self._restore(self.resumed)

    def _restore(self, saved: Snapshot) -> None:
        """Take over the finished samples and the bill of an earlier search of the same problem."""
        counters = {name: int(value) for name, value in saved.counters.items() if name != "wall_s"}
        self.nfe, self.rollouts, self.reward_calls, self.recomputed_tokens, self._earlier_calls = (
            counters[n]
            for n in ("nfe", "rollouts", "reward_calls", "recomputed_tokens", "model_calls")
        )
        self.wall_s = saved.counters["wall_s"]
        self._index = {sequence: i for i, sequence in enumerate(saved.sequences)}
        sequences = (
            [tuple(t for b in s for t in saved.blocks[b]) for s in saved.sequences]
            if saved.blocks
            else saved.sequences
        )
        scores = Scores(saved.rewards, saved.components, self.process.decode(self.root, sequences))
        reasons: list[FinishReason] = [
            self.process.finish_reason(sequence) for sequence in sequences
        ]
        self.finished = [
            _sample(scores, i, float(saved.log_probs[i]), reasons[i]) for i in range(len(sequences))
        ]

    def start_tree(self) -> Tree:
        """The tree to search on: a new one, or a copy of the resumed search's."""
        return Tree() if self.resumed is None else Tree.from_arrays(self.resumed.tree.arrays())

    def work_in_blocks(self, block_size: int | None, branch_depths: Sequence[int] | None) -> None:
        """From now on states are sequences of token blocks (see `blocks`)."""
        assert not isinstance(self.process, BlockProcess)
        ends = block_ends(self.process.max_new_tokens, block_size, branch_depths)
        self.process = BlockProcess(self.process, ends, self.resumed.blocks if self.resumed else ())

    @property
    def root(self) -> Root:
        return self.problem.root

    def key(self, *parts: int | str) -> int:
        """A stream key of this problem (docs/concepts/target.md: seed, problem, then what the draw belongs to)."""
        return stream_key(self.seed, self.problem.index, *parts)

    def tilt(self, draws: Literal["p", "q"]) -> Tilt | None:
        """What requests for draws from p or q carry; None, and all draws are from p, without a flow."""
        return (
            None if self.flow is None else Tilt(self.flow, self.options.inverse_temperature, draws)
        )

    def rng(self, purpose: str) -> np.random.Generator:
        """A numpy generator for a purpose that is not a draw from p, such as the final resampling."""
        return np.random.default_rng(self.key(purpose))

    def ask(self, requests: Sequence[ExpandRequest | RolloutRequest]) -> Ask:
        """Send model requests and count what they cost."""
        process = self.process
        if isinstance(process, BlockProcess):
            draws = cast(Sequence[RolloutRequest], requests)
            answers = cast(list[Rollout], (yield [process.to_tokens(request) for request in draws]))
            replies: list[Reply] = [
                process.to_blocks(*pair) for pair in zip(draws, answers, strict=True)
            ]
        else:
            replies = yield list(requests)
        for reply in replies:
            self._pay(reply.cost)  # type: ignore[union-attr]
        if not self.root.paid:
            self.problem = replace(self.problem, root=replace(self.root, paid=True))
        return replies

    def roll_out(
        self, requests: Sequence[RolloutRequest]
    ) -> Generator[list[Request], list[Reply], list[Rollout]]:
        """`ask` for rollouts only."""
        replies = (yield from self.ask(requests)) if requests else []
        return cast(list[Rollout], replies)

    def _pay(self, cost: Cost) -> None:
        self.nfe += cost.nfe
        self.calls |= cost.calls
        self.recomputed_tokens += cost.recomputed_tokens

    def score(
        self,
        sequences: Sequence[tuple[int, ...]],
        log_probs: Sequence[float],
        reasons: Sequence[FinishReason],
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
                self.finished.append(
                    _sample(scores, row, float(log_probs[position]), reasons[position])
                )
        return [self._index[sequence] for sequence in sequences]

    def score_partial(
        self, sequences: list[tuple[int, ...]]
    ) -> Generator[list[Request], list[Reply], np.ndarray]:
        """The reward's partial form of unfinished sequences [B]."""
        (scores,) = yield [ScoreRequest(sequences, partial=True)]
        assert isinstance(scores, Scores)
        return scores.rewards

    def adopt(
        self,
        sequences: Sequence[tuple[int, ...]],
        log_probs: np.ndarray,
        components: Sequence[Mapping[str, float]],
    ) -> None:
        """Make these sequences `finished`, in this order; all that was scored here must be among them.

        What other searches scored is decoded and gets its reward from their raw terms [S]; nothing is paid for it.
        """
        new = [i for i, sequence in enumerate(sequences) if sequence not in self._index]
        decoded = dict(
            zip(new, self.process.decode(self.root, [sequences[i] for i in new]), strict=True)
        )
        samples = []
        multipliers = self.problem.reward.multipliers
        for i, sequence in enumerate(sequences):
            if i not in decoded:
                samples.append(self.finished[self._index[sequence]])
                continue
            reward = reward_of(components[i], multipliers)
            terms = {name: np.array([term]) for name, term in components[i].items()}
            scores = Scores(np.array([reward]), terms, [decoded[i]])
            reason = self.process.finish_reason(sequence)
            samples.append(_sample(scores, 0, float(log_probs[i]), reason))
        self.finished = samples
        self._index = {sequence: i for i, sequence in enumerate(sequences)}

    def index_of(self, sequence: tuple[int, ...]) -> int:
        """Index into `finished` of a token sequence (end token included) that was scored."""
        return self._index[sequence]

    def rewards(self, indices: Sequence[int]) -> np.ndarray:
        """Rewards [B] of finished samples."""
        return np.array([self.finished[i].reward for i in indices], dtype=np.float64)

    def next_wave(self, wave_size: int) -> int:
        """How many rollouts to start now; 0 when the budget is spent (docs/concepts/exactness.md#cost: within one wave)."""
        options = self.options
        if (
            options.time_budget_s is not None
            and self.rollouts
            and self.elapsed_s() >= options.time_budget_s
        ):
            return 0
        allowed = wave_size
        if options.rollout_limit is not None:
            allowed = min(allowed, options.rollout_limit - self.rollouts)
        if options.max_nfe is not None:
            typical = self.nfe / self.rollouts if self.rollouts else self._tokens_per_rollout
            left = (options.max_nfe - self.nfe) / max(typical, 1.0)
            allowed = min(allowed, round(left) if self.rollouts else max(round(left), 1))
        return max(allowed, 0)

    def elapsed_s(self) -> float:
        return self.clock() - self._started

    def cost(self) -> SearchCost:
        """The counters so far; wall_s is this problem's equal share of the rounds in which it took part."""
        return SearchCost(
            self.nfe,
            self._earlier_calls + len(self.calls),
            self.rollouts,
            self.reward_calls,
            self.recomputed_tokens,
            self.wall_s,
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
        notes: dict[str, np.ndarray] | None = None,
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
            snapshot=None if tree is None else self.snapshot(method, tree, notes or {}),
            probabilities=probabilities,
            flow=self.flow,
            **fields,
        )

    def header(self, method: str) -> dict[str, Any]:
        """What identifies this search when it is resumed."""
        return {
            "method": method,
            "seed": self.seed,
            "problem": self.problem.index,
            "prompt": prompt_digest(self.root.prompt).hex(),
            "max_new_tokens": self._tokens_per_rollout,
            "options": self.options.model_dump(mode="json"),
            **({} if self.flow is None else {"flow": self.flow}),
        }

    def snapshot(self, method: str, tree: Tree, notes: dict[str, np.ndarray]) -> Snapshot:
        """The search as it stands, for saving and resuming."""
        names = list(self.finished[0].components) if self.finished else []
        return Snapshot(
            self.header(method),
            asdict(self.cost()),
            tree,
            list(self._index),
            np.array([sample.reward for sample in self.finished]),
            np.array([sample.log_prob for sample in self.finished]),
            {
                name: np.array([sample.components[name] for sample in self.finished])
                for name in names
            },
            list(self.process.blocks) if isinstance(self.process, BlockProcess) else [],
            notes,
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
