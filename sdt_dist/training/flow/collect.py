"""Trajectories by searching in this process: from trees where a method makes one, else from its finished samples.

See docs/concepts/flow.md.

Either way the candidates are rows of p itself: complete, or a Gumbel-top-k draw with Horvitz-Thompson weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdt_dist.errors import SdtError
from sdt_dist.models.process import ModelProcess
from sdt_dist.noise import gumbel
from sdt_dist.protocols import ExpandRequest, Expansion, Flow, Root, Sample, prompt_digest
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from sdt_dist.training.flow.extract import (
    Row,
    expand_by_depth,
    row_key,
    stratified,
    trajectories_of,
    with_rows,
    with_token,
)
from sdt_dist.training.flow.progress import Brought
from sdt_dist.training.flow.trajectories import Candidates, Trajectory, horvitz_thompson_log_weights

Tokens = tuple[int, ...]
_VALUES_A_CALL = 1 << 22  # numbers in the complete rows that one call brings


@dataclass(frozen=True, slots=True)
class Collected:
    """What searches of some problems brought: trajectories, each problem's mean reward and ESS, and the errors of others."""

    trajectories: list[Trajectory]
    rewards: list[float]
    ess: list[float]
    errors: list[SdtError]

    def brought(self, method: str) -> Brought:
        """Counts and means of these searches of a method; None where nothing is known."""
        return Brought(
            len(self.trajectories),
            method=method,
            searches=len(self.rewards),
            failed=len(self.errors),
            reward=float(np.mean(self.rewards)) if self.rewards else None,
            ess=float(np.mean(self.ess)) if self.ess else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class FinishedSearch:
    """What training needs of one finished search but rows of p: small enough to send, and made without a model.

    walks: finished sequences of a tree, with no candidates but their own tokens; samples: those of a search without a
    tree, where walks is None. reward and ess: the mean over the method's samples, and theirs.
    """

    prompt: tuple[int, ...]
    source: dict[str, Any]
    walks: list[Trajectory] | None
    samples: list[Sample]
    reward: float
    ess: float | None

    @classmethod
    def of(cls, result: SearchResult, root: Root, index: int) -> FinishedSearch:
        """What `result`, the search of problem `index` from `root`, brought."""
        source = {"method": result.method, "seed": result.seed, "problem": index}
        has_tree = result.snapshot is not None and not result.snapshot.blocks
        walks = (
            [_bare(t) for t in trajectories_of(result.snapshot, root)]
            if result.snapshot and has_tree
            else None
        )
        samples = (
            []
            if has_tree
            else [replace(s, text=None, series=None, components={}) for s in result.finished]
        )
        reward = float(np.dot(result.weights, [sample.reward for sample in result.samples]))
        return cls(root.prompt, source, walks, samples, reward, result.ess)

    @property
    def root(self) -> Root:
        """Where it began, without what only decoding needs."""
        return Root(self.prompt, prompt_digest(self.prompt))

    def trajectories(
        self, process: ModelProcess, num_children: int | None, seed: int, *, ordered: bool = False
    ) -> list[Trajectory]:
        """Its trajectories with rows of p (see `with_rows`), for which the process is asked."""
        root = self.root
        if self.walks is not None:
            return with_rows(process, root, self.walks, num_children, seed, ordered=ordered)
        return trajectories_of_samples(
            process, root, self.samples, num_children, seed, self.source, ordered=ordered
        )


def _bare(trajectory: Trajectory) -> Trajectory:
    """The trajectory without siblings."""
    count = len(trajectory.tokens)
    nothing = np.full(count, -np.inf)
    unknown = np.full(count, np.nan)
    own = Candidates(
        trajectory.tokens, trajectory.log_prob, nothing, unknown, np.arange(1, count + 1)
    )
    return replace(trajectory, candidates=own)


def collect(
    process: ModelProcess,
    problems: Sequence[SearchProblem],
    method: str,
    options: dict[str, Any],
    *,
    seed: int,
    flow: Flow | None = None,
    num_children: int | None = None,
    ordered: bool = False,
) -> Collected:
    """Search problems with a method and its options; every finished sample becomes a trajectory with rows of p.

    flow: what the method proposes with, if anything. num_children: candidates a step, None for complete rows;
    ordered: whether tokens are values (see `with_rows`). Rewards in
    `rewards` are the means of the method's samples. A problem whose search fails is left out, its error returned.
    """
    by_index = {problem.index: problem for problem in problems}
    runs = run_searches(process, problems, method=method, options=options, seed=seed, flow=flow)
    outcomes = dict(runs)
    found = Collected([], [], [], [])
    for index in sorted(outcomes):
        outcome = outcomes[index]
        root = by_index[index].root
        if isinstance(outcome, SdtError):
            found.errors.append(outcome)
            continue
        search = FinishedSearch.of(outcome, root, index)
        found.trajectories.extend(search.trajectories(process, num_children, seed, ordered=ordered))
        process.release(root)
        found.rewards.append(search.reward)
        if search.ess is not None:
            found.ess.append(search.ess)
    return found


def trajectories_of_samples(
    process: ModelProcess,
    root: Root,
    samples: Sequence[Sample],
    num_children: int | None = None,
    seed: int = 0,
    source: dict[str, Any] | None = None,
    *,
    ordered: bool = False,
) -> list[Trajectory]:
    """Finished samples of one context, without a tree, as trajectories; candidates as in `with_rows`.

    Costs one next-token distribution per distinct state. A sample that ended by one of several end tokens is taken to have
    ended by that which explains its log-probability best, because samples do not name it.
    """
    rows = _rows(process, root, samples, num_children, seed, ordered)
    sequences = [_with_end(process, sample, rows) for sample in samples]
    rewards = {sequence: sample.reward for sequence, sample in zip(sequences, samples, strict=True)}
    return [_trajectory(root, sequence, rows, rewards, source or {}) for sequence in rewards]


@dataclass(frozen=True, slots=True)
class _State:
    """A state's candidates, and log p of the tokens that samples go on with."""

    row: Row
    log_prob: dict[int, float]


def _rows(
    process: ModelProcess,
    root: Root,
    samples: Sequence[Sample],
    num_children: int | None,
    seed: int,
    ordered: bool,
) -> dict[Tokens, _State]:
    """Every state of the samples. Rows are asked for whole, because draws need not have the samples' own tokens."""
    (low, high), ends = process.law.allowed, process.law.end_tokens
    next_tokens: dict[Tokens, dict[int, None]] = {}
    for sample in samples:
        for t, token in enumerate(sample.tokens):
            next_tokens.setdefault(sample.tokens[:t], {})[token] = None
        if sample.finish_reason == "eos":
            next_tokens.setdefault(sample.tokens, {}).update(dict.fromkeys(ends))
    states = list(next_tokens)
    size = max(1, _VALUES_A_CALL // (high - low))
    rows: dict[Tokens, _State] = {}
    for place, whole in expand_by_depth(
        process, [ExpandRequest(root, s, high - low) for s in states], size
    ):
        state = states[place]
        found = {token: np.flatnonzero(whole.children == token) for token in next_tokens[state]}
        log_prob = {
            t: float(whole.log_prob[at[0]]) if len(at) else -np.inf for t, at in found.items()
        }
        key = None if num_children is None else row_key(seed, root, state)
        if ordered and num_children is not None and key is not None:
            row = stratified((whole.children, whole.log_prob, whole.log_prob), num_children, key)
        else:
            row = _thinned(whole, key, num_children, high)
        rows[state] = _State(row, log_prob)
    return rows


def _thinned(whole: Expansion, key: int | None, num_children: int | None, num_tokens: int) -> Row:
    """The draw without replacement that an expansion with this key would be, from the whole row."""
    if key is None or num_children is None or len(whole.children) <= num_children:
        return whole.children, whole.log_prob, whole.log_prob
    perturbed = (
        whole.log_prob + gumbel(np.array([key], dtype=np.uint64), num_tokens)[0, whole.children]
    )
    order = np.argsort(-perturbed, kind="stable")
    kept = order[:num_children]
    threshold = float(perturbed[order[num_children]])
    log_prob = whole.log_prob[kept]
    return whole.children[kept], log_prob, horvitz_thompson_log_weights(log_prob, threshold)


def _with_end(process: ModelProcess, sample: Sample, rows: dict[Tokens, _State]) -> Tokens:
    """A sample's tokens with the end token that it came with."""
    tokens = sample.tokens
    if sample.finish_reason != "eos":
        return tokens
    left = sample.log_prob - sum(rows[tokens[:t]].log_prob[token] for t, token in enumerate(tokens))
    return *tokens, min(
        process.law.end_tokens, key=lambda end: abs(rows[tokens].log_prob[end] - left)
    )


def _trajectory(
    root: Root,
    sequence: Tokens,
    rows: dict[Tokens, _State],
    rewards: dict[Tokens, float],
    source: dict[str, Any],
) -> Trajectory:
    steps = []
    log_probs = []
    for t, token in enumerate(sequence):
        prefix = sequence[:t]
        log_probs.append(rows[prefix].log_prob[token])
        row = with_token(rows[prefix].row, token, log_probs[-1])
        steps.append((*row, np.array([rewards.get((*prefix, c), np.nan) for c in row[0].tolist()])))
    return Trajectory(
        root.digest.hex(),
        np.array(root.prompt, dtype=np.int32),
        np.array(sequence, dtype=np.int32),
        np.array(log_probs),
        Candidates.join(steps),
        rewards[sequence],
        source=source,
    )
