"""Rows whose tokens are drawn from p, or from a learned proposal q(a|s) ~ p(a|s) exp(lambda F(s a)).

See docs/concepts/flow.md#proposal.

Every backend that computes rows of p in this process chooses its tokens here. With a tilt both laws' probabilities of
what was drawn are reported, so that searches can weight by p/q whatever F is. It must not know models or searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.reduction import draw, largest, measure
from sdt_dist.noise import proposal_key
from sdt_dist.protocols import Cost, Expansion, FinishReason, Flow, Rollout, State, Tilt

_WIDEST = 64.0  # nats between the tilts of two tokens; more would make no difference to a draw, and could make q 0
Column = TypeVar("Column", float, np.ndarray)


@dataclass(frozen=True, slots=True)
class RowAsk:
    """What is asked of one row: the state it is the row of, and how tokens are chosen from it (as in requests)."""

    state: State
    key: int | None
    excluded: tuple[int, ...]
    tilt: Tilt | None


@dataclass(frozen=True, slots=True)
class UnderProposal(Generic[Column]):
    """Of the tokens chosen from a row that has a tilt: log q, the log mass of q outside them, lambda F."""

    log_prob: Column
    log_residual: float
    log_tilt: Column


@dataclass(frozen=True, slots=True)
class Step(Generic[Column]):
    """Of the tokens chosen from one row: log p, the log mass of p outside them, how many tokens are there.

    Columns are numbers for the one token of a draw, and arrays [K] for children. proposal: None without a tilt.
    """

    log_prob: Column
    log_residual: float
    num_remaining: int
    proposal: UnderProposal[Column] | None = None


Draw = tuple[int, Step[float]]
Children = tuple[np.ndarray, Step[np.ndarray]]  # tokens [K] int32


class Flows:
    """The flows that a backend holds, by identity."""

    def __init__(self) -> None:
        self._flows: dict[str, Flow] = {}

    def load(self, flow: Flow) -> None:
        self._flows[flow.identity] = flow

    def drop(self, identity: str) -> None:
        """Forget a flow; harmless where it is not held."""
        self._flows.pop(identity, None)

    def draw(
        self, scores: np.ndarray, asks: Sequence[RowAsk]
    ) -> tuple[list[int], list[Step[float]]]:
        """One token a row, as `reduction.draw`, and what is reported of it. scores [B, V] as from `law_scores`.

        ConfigurationError for a tilt by a flow that is not held, or that returns what is no tilt.
        """
        found: dict[int, Draw] = {}
        plain, tilted = _by_tilt(asks)
        if plain:
            draws = _draws_from_p(_rows(scores, plain), [asks[i] for i in plain])
            found |= zip(plain, draws, strict=True)
        if tilted:
            laws = _Laws(self, scores[tilted], [asks[i] for i in tilted])
            found |= zip(tilted, laws.draws(), strict=True)
        tokens = [found[i][0] for i in range(len(asks))]
        steps = [found[i][1] for i in range(len(asks))]
        return tokens, steps

    def largest(
        self, scores: np.ndarray, num_children: Sequence[int], asks: Sequence[RowAsk]
    ) -> list[Children]:
        """Tokens [K] a row, as `reduction.largest`, and what is reported of them; errors as in `draw`."""
        found: dict[int, Children] = {}
        plain, tilted = _by_tilt(asks)
        if plain:
            wanted = [num_children[i] for i in plain]
            children = _children_under_p(_rows(scores, plain), wanted, [asks[i] for i in plain])
            found |= zip(plain, children, strict=True)
        if tilted:
            laws = _Laws(self, scores[tilted], [asks[i] for i in tilted])
            children = laws.children([num_children[i] for i in tilted])
            found |= zip(tilted, children, strict=True)
        return [found[i] for i in range(len(asks))]

    def log_tilts(self, asks: Sequence[RowAsk], log_prob: np.ndarray) -> np.ndarray:
        """lambda F [B, V] of the children of rows that all have a tilt; 0 where p is 0; log_prob [B, V]."""
        possible = log_prob > -np.inf
        tilts = np.zeros(possible.shape)
        groups: dict[tuple[str, float], list[int]] = {}
        for i, ask in enumerate(asks):
            assert ask.tilt is not None
            groups.setdefault((ask.tilt.flow, ask.tilt.inverse_temperature), []).append(i)
        for (name, inverse_temperature), rows in groups.items():
            states = [asks[i].state for i in rows]
            found = self._named(name).log_tilts(states, inverse_temperature, log_prob[rows])
            _check_tilts(found, possible[rows], name)
            tilts[rows] = np.where(possible[rows], found, 0.0)
        return tilts

    def _named(self, name: str) -> Flow:
        if name not in self._flows:
            raise ConfigurationError(
                f"tilt: flow {name!r} is not held by this model, which has {sorted(self._flows) or 'none'}; give it "
                "with load_flow(flow) first."
            )
        return self._flows[name]


class _Laws:
    """p and q of rows that all have a tilt, and from which of them each row is drawn."""

    def __init__(self, flows: Flows, scores: np.ndarray, asks: Sequence[RowAsk]) -> None:
        self.p = scores.astype(np.float64)
        self.excluded = [ask.excluded for ask in asks]
        self.log_tilt = flows.log_tilts(asks, self.p)
        possible_tilt = np.where(self.p > -np.inf, self.log_tilt, -np.inf)
        highest = possible_tilt.max(axis=1, keepdims=True)
        self.q = self.p + np.maximum(self.log_tilt, highest - _WIDEST)
        from_q = np.array([_draws_from_q(ask) for ask in asks])
        self.chosen = np.where(from_q[:, None], self.q, self.p)
        self.keys = [_key_of(ask) for ask in asks]

    def draws(self) -> list[Draw]:
        """One token a row."""
        tokens, *_ = draw(self.chosen, self.keys, self.excluded)
        found = []
        for token, step in zip(
            tokens.tolist(), self._report(tokens[:, None].tolist()), strict=True
        ):
            assert step.proposal is not None
            of_proposal = UnderProposal(
                step.proposal.log_prob[0],
                step.proposal.log_residual,
                step.proposal.log_tilt[0],
            )
            step = Step(step.log_prob[0], step.log_residual, step.num_remaining, of_proposal)
            found.append((token, step))
        return found

    def children(self, num_children: Sequence[int]) -> list[Children]:
        """Tokens [K] a row."""
        found = largest(self.chosen, num_children, self.keys, self.excluded)
        chosen = [tokens for tokens, *_ in found]
        steps = self._report([tokens.tolist() for tokens in chosen])
        return list(zip(chosen, steps, strict=True))

    def _report(self, chosen: list[list[int]]) -> list[Step[np.ndarray]]:
        """What is reported of K tokens a row, whichever law chose them."""
        under_p = measure(self.p, chosen, self.excluded)
        under_q = measure(self.q, chosen, self.excluded)
        steps = []
        for row, tokens in enumerate(chosen):
            log_p, log_rest, count = under_p[row]
            log_q, log_rest_q, _ = under_q[row]
            of_proposal = UnderProposal(log_q, log_rest_q, self.log_tilt[row, tokens])
            steps.append(Step(log_p, log_rest, count, of_proposal))
        return steps


def _by_tilt(asks: Sequence[RowAsk]) -> tuple[list[int], list[int]]:
    """(rows without a tilt, rows with one)."""
    plain = [i for i, ask in enumerate(asks) if ask.tilt is None]
    tilted = [i for i, ask in enumerate(asks) if ask.tilt is not None]
    return plain, tilted


def _rows(scores: np.ndarray, rows: list[int]) -> np.ndarray:
    """Some of the scores [B, V]; all of them without a copy."""
    return scores if len(rows) == len(scores) else scores[rows]


def _draws_from_p(scores: np.ndarray, asks: Sequence[RowAsk]) -> list[Draw]:
    keys = [ask.key for ask in asks]
    excluded = [ask.excluded for ask in asks]
    columns = draw(scores, keys, excluded)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(token, Step(log_p, log_rest, count)) for token, log_p, log_rest, count in rows]


def _children_under_p(
    scores: np.ndarray, num_children: Sequence[int], asks: Sequence[RowAsk]
) -> list[Children]:
    keys = [ask.key for ask in asks]
    excluded = [ask.excluded for ask in asks]
    rows = largest(scores, num_children, keys, excluded)
    return [(tokens, Step(log_p, log_rest, count)) for tokens, log_p, log_rest, count in rows]


def _draws_from_q(ask: RowAsk) -> bool:
    return ask.tilt is not None and ask.tilt.draws == "q"


def _key_of(ask: RowAsk) -> int | None:
    """The noise of a row: draws from q have their own, by the flow's name."""
    if ask.tilt is None or ask.tilt.draws != "q" or ask.key is None:
        return ask.key
    return proposal_key(ask.key, ask.tilt.flow)


def _check_tilts(tilts: np.ndarray, possible: np.ndarray, name: str) -> None:
    """ConfigurationError unless tilts are [B, V] as `possible`, and finite wherever that is true."""
    if tilts.shape != possible.shape or not np.isfinite(tilts[possible]).all():
        num_rows, vocab_size = possible.shape
        raise ConfigurationError(
            f"flow {name!r}: log_tilts returned shape {tilts.shape} for {num_rows} states of {vocab_size} "
            "tokens, or NaN or infinity; allowed: [B, V], finite wherever p > 0."
        )


def expansion(children: np.ndarray, step: Step[np.ndarray], cost: Cost) -> Expansion:
    """The reply of children [K] and what was reported of them."""
    of_proposal = step.proposal
    if of_proposal is None:
        return Expansion(
            children, step.log_prob, step.log_prob, step.log_residual, step.num_remaining, cost
        )
    return Expansion(
        children,
        step.log_prob,
        step.log_prob,
        step.log_residual,
        step.num_remaining,
        cost,
        of_proposal.log_prob,
        of_proposal.log_residual,
        of_proposal.log_tilt,
    )


def rollout(
    tokens: Sequence[int],  # [n]
    steps: Sequence[Step[float]],  # [n]
    reason: FinishReason,
    cost: Cost,
    tilt: Tilt | None,
) -> Rollout:
    """The reply of n tokens and what was reported of each."""
    plain = Rollout(
        np.array(tokens, dtype=np.int32),
        np.array([step.log_prob for step in steps], dtype=np.float64),
        np.array([step.log_residual for step in steps], dtype=np.float64),
        np.array([step.num_remaining for step in steps], dtype=np.int32),
        reason,
        cost,
    )
    if tilt is None:
        return plain
    of_proposal = [step.proposal for step in steps if step.proposal is not None]
    return replace(
        plain,
        log_proposal=np.array([q.log_prob for q in of_proposal], dtype=np.float64),
        log_residual_proposal=np.array([q.log_residual for q in of_proposal], dtype=np.float64),
        log_tilt=np.array([q.log_tilt for q in of_proposal], dtype=np.float64),
    )
