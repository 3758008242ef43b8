"""One problem's search under way: its states, its budget, and every finished sample with its own reward.

Methods are generators over `Session` helpers; each `yield` hands requests to the driver and receives replies in
the same order. Nothing here calls a model or a reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np

from sdt_dist.noise import stream_key
from sdt_dist.protocols import (
    Decoded,
    FinishReason,
    ModelReply,
    ModelRequest,
    Reward,
    Rollout,
    RolloutRequest,
    Root,
    Sample,
    States,
    Tilt,
    prompt_digest,
)
from sdt_dist.search.blocks import BlockStates, block_ends
from sdt_dist.search.budget import Budget
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.result import SearchResult
from sdt_dist.search.states import PlainStates, TreeStates, model_tokens
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

    kind: ClassVar[Literal["score"]] = "score"
    is_single_step: ClassVar[bool] = False  # rewards are answered between rounds

    sequences: list[tuple[int, ...]]
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards [B], their raw components by name [B], and the decoded answers."""

    rewards: np.ndarray
    components: dict[str, np.ndarray]
    decoded: list[Decoded]


Request = ModelRequest | ScoreRequest | ShareRequest
Reply = ModelReply | Scores | Shared
Ask = Generator[list[Request], list[Reply], list[Reply]]


@dataclass
class Session:
    """State that every method shares for one problem.

    model_states: how the model's states read. membership: where several searches work on the problem, or earlier evidence
    is joined. flow: the identity of the flow that its method uses; the model holds it. `states` is what methods see.
    """

    problem: SearchProblem
    model_states: States
    options: SearchOptions
    seed: int
    clock: Callable[[], float] = time.monotonic
    resumed: Snapshot | None = None
    membership: Membership | None = None
    flow: str | None = None
    finished: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.states: TreeStates = PlainStates(self.model_states)
        self.budget = Budget(self.model_states.max_new_tokens, self.clock)
        self._index: dict[tuple[int, ...], int] = {}
        if self.resumed is not None:
            self._restore(self.resumed)

    def _restore(self, saved: Snapshot) -> None:
        """Take over the finished samples and the bill of an earlier search of the same problem."""
        self.budget.go_on_from(saved.counters)
        self._index = {sequence: i for i, sequence in enumerate(saved.sequences)}
        sequences = [model_tokens(sequence, saved.blocks) for sequence in saved.sequences]
        decoded = self.model_states.decode(self.root, sequences)
        scores = Scores(saved.rewards, saved.components, decoded)
        self.finished = [
            _sample(
                scores,
                row,
                float(saved.log_probs[row]),
                self.model_states.finish_reason(sequence),
            )
            for row, sequence in enumerate(sequences)
        ]

    def start_tree(self) -> Tree:
        """The tree to search on: a new one, or a copy of the resumed search's."""
        return Tree() if self.resumed is None else Tree.from_arrays(self.resumed.tree.arrays())

    def work_in_blocks(self, block_size: int | None, branch_depths: Sequence[int] | None) -> None:
        """From now on tree states are sequences of token blocks (see `blocks`)."""
        ends = block_ends(self.model_states.max_new_tokens, block_size, branch_depths)
        known = self.resumed.blocks if self.resumed else ()
        self.states = BlockStates(self.model_states, ends, known)

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

    def ask(self, requests: Sequence[ModelRequest]) -> Ask:
        """Send model requests about tree states and count what they cost."""
        states = self.states
        answers = yield [states.to_model(request) for request in requests]
        replies: list[Reply] = []
        for request, answer in zip(requests, cast(list[ModelReply], answers), strict=True):
            replies.append(states.to_tree(request, answer))
            self.budget.pay(answer.cost)
        if not self.root.paid:
            self.problem = replace(self.problem, root=replace(self.root, paid=True))
        return replies

    def roll_out(
        self, requests: Sequence[RolloutRequest]
    ) -> Generator[list[Request], list[Reply], list[Rollout]]:
        """`ask` for rollouts only."""
        replies = (yield from self.ask(requests)) if requests else []
        return cast(list[Rollout], replies)

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
            self.budget.reward_calls += len(new)
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
        answers = self.states.decode(self.root, [sequences[i] for i in new])
        decoded = dict(zip(new, answers, strict=True))
        samples = []
        multipliers = self.problem.reward.multipliers
        for i, sequence in enumerate(sequences):
            if i not in decoded:
                samples.append(self.finished[self._index[sequence]])
                continue
            reward = reward_of(components[i], multipliers)
            terms = {name: np.array([term]) for name, term in components[i].items()}
            scores = Scores(np.array([reward]), terms, [decoded[i]])
            reason = self.states.finish_reason(sequence)
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
        return self.budget.next_wave(self.options, wave_size)

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
            cost=self.budget.cost(),
            deterministic=self.states.deterministic,
            tree_stats={}
            if tree is None
            else tree.stats() | {"rollouts": float(self.budget.rollouts)},
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
            "max_new_tokens": self.model_states.max_new_tokens,
            "options": self.options.model_dump(mode="json"),
            **({} if self.flow is None else {"flow": self.flow}),
        }

    def snapshot(self, method: str, tree: Tree, notes: dict[str, np.ndarray]) -> Snapshot:
        """The search as it stands, for saving and resuming."""
        names = list(self.finished[0].components) if self.finished else []
        return Snapshot(
            self.header(method),
            asdict(self.budget.cost()),
            tree,
            list(self._index),
            np.array([sample.reward for sample in self.finished]),
            np.array([sample.log_prob for sample in self.finished]),
            {
                name: np.array([sample.components[name] for sample in self.finished])
                for name in names
            },
            list(self.states.blocks),
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
