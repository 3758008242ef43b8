"""Rows whose tokens are drawn from p, or from a learned proposal q(a|s) ~ p(a|s) exp(lambda F(s a)).

See docs/concepts/flow.md#proposal.

Every backend that computes rows of p in this process chooses its tokens here. With a tilt both laws' probabilities of
what was drawn are reported, so that searches can weight by p/q whatever F is. It must not know models or searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.reduction import draw, largest, measure
from sdt_dist.noise import proposal_key
from sdt_dist.protocols import Cost, Expansion, FinishReason, Flow, Rollout, State, Tilt

_WIDEST = 64.0  # nats between the tilts of two tokens; more would make no difference to a draw, and could make q 0

# log p, log mass outside, count outside; with a tilt also log q, its log mass outside, lambda F
Step = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class RowAsk:
    """What is asked of one row: the state it is the row of, and how tokens are chosen from it (as in requests)."""

    state: State
    key: int | None
    excluded: tuple[int, ...]
    tilt: Tilt | None


class Flows:
    """The flows that a backend holds, by identity."""

    def __init__(self) -> None:
        self._flows: dict[str, Flow] = {}

    def load(self, flow: Flow) -> None:
        self._flows[flow.identity] = flow

    def drop(self, identity: str) -> None:
        """Forget a flow; harmless where it is not held."""
        self._flows.pop(identity, None)

    def draw(self, scores: np.ndarray, asks: Sequence[RowAsk]) -> tuple[list[int], list[Step]]:
        """One token a row, as `reduction.draw`, and what is reported of it. scores [B, V] as from `law_scores`.

        ConfigurationError for a tilt by a flow that is not held, or that returns what is no tilt.
        """
        tokens: list[int] = [0] * len(asks)
        steps: list[Step] = [()] * len(asks)
        plain = [i for i, ask in enumerate(asks) if ask.tilt is None]
        if plain:
            rows = scores if len(plain) == len(asks) else scores[plain]
            found, *columns = draw(
                rows, [asks[i].key for i in plain], [asks[i].excluded for i in plain]
            )
            for i, token, *step in zip(
                plain, found.tolist(), *(c.tolist() for c in columns), strict=True
            ):
                tokens[i], steps[i] = token, tuple(step)
        tilted = [i for i, ask in enumerate(asks) if ask.tilt is not None]
        if tilted:
            laws = _Laws(self, scores[tilted], [asks[i] for i in tilted])
            found, *_ = draw(laws.chosen, laws.keys, laws.excluded)
            for i, token, step in zip(
                tilted, found.tolist(), laws.report(found[:, None].tolist()), strict=True
            ):
                log_p, log_rest, count, log_q, log_rest_q, log_tilt = step
                tokens[i], steps[i] = (
                    token,
                    (log_p[0], log_rest, count, log_q[0], log_rest_q, log_tilt[0]),
                )
        return tokens, steps

    def largest(
        self, scores: np.ndarray, num_children: Sequence[int], asks: Sequence[RowAsk]
    ) -> list[tuple[np.ndarray, Step]]:
        """Tokens [K] a row, as `reduction.largest`, and what is reported of them; errors as in `draw`."""
        replies: list[tuple[np.ndarray, Step]] = [(np.empty(0, np.int32), ())] * len(asks)
        plain = [i for i, ask in enumerate(asks) if ask.tilt is None]
        if plain:
            rows = scores if len(plain) == len(asks) else scores[plain]
            keys = [asks[i].key for i in plain]
            excluded = [asks[i].excluded for i in plain]
            found = largest(rows, [num_children[i] for i in plain], keys, excluded)
            for i, (tokens, *step) in zip(plain, found, strict=True):
                replies[i] = tokens, tuple(step)
        tilted = [i for i, ask in enumerate(asks) if ask.tilt is not None]
        if tilted:
            laws = _Laws(self, scores[tilted], [asks[i] for i in tilted])
            found = largest(
                laws.chosen, [num_children[i] for i in tilted], laws.keys, laws.excluded
            )
            chosen = [tokens for tokens, *_ in found]
            for i, tokens, step in zip(
                tilted, chosen, laws.report([t.tolist() for t in chosen]), strict=True
            ):
                replies[i] = tokens, step
        return replies

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
            if (
                found.shape != (len(rows), possible.shape[1])
                or not np.isfinite(found[possible[rows]]).all()
            ):
                raise ConfigurationError(
                    f"flow {name!r}: log_tilts returned shape {found.shape} for {len(rows)} states of {possible.shape[1]} "
                    "tokens, or NaN or infinity; allowed: [B, V], finite wherever p > 0."
                )
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
        highest = np.where(self.p > -np.inf, self.log_tilt, -np.inf).max(axis=1, keepdims=True)
        self.q = self.p + np.maximum(self.log_tilt, highest - _WIDEST)
        from_q = np.array([ask.tilt is not None and ask.tilt.draws == "q" for ask in asks])
        self.chosen = np.where(from_q[:, None], self.q, self.p)
        self.keys = [
            proposal_key(ask.key, ask.tilt.flow)
            if q and ask.key is not None and ask.tilt is not None
            else ask.key
            for ask, q in zip(asks, from_q.tolist(), strict=True)
        ]

    def report(self, chosen: list[list[int]]) -> list[Step]:
        """For K tokens a row: log p [K], log mass and count outside; log q [K], its log mass outside; lambda F [K]."""
        under_p, under_q = (measure(law, chosen, self.excluded) for law in (self.p, self.q))
        return [
            (*of_p, *of_q[:2], tilts[tokens])
            for of_p, of_q, tilts, tokens in zip(
                under_p, under_q, self.log_tilt, chosen, strict=True
            )
        ]


def expansion(children: np.ndarray, step: Step, cost: Cost) -> Expansion:
    """The reply of children [K] and what was reported of them."""
    log_prob, log_residual, count, *of_proposal = step
    return Expansion(children, log_prob, log_prob, log_residual, count, cost, *of_proposal)


def rollout(
    tokens: Sequence[int],
    steps: Sequence[Step],
    reason: FinishReason,
    cost: Cost,
    tilt: Tilt | None,
) -> Rollout:
    """The reply of n tokens and what was reported of each."""
    kinds = [np.float64, np.float64, np.int32, *[np.float64] * (3 if tilt is not None else 0)]
    columns = [np.array([step[i] for step in steps], dtype=kind) for i, kind in enumerate(kinds)]
    found, (log_prob, log_residual, count, *of_proposal) = np.array(tokens, dtype=np.int32), columns
    return Rollout(found, log_prob, log_residual, count, reason, cost, *of_proposal)
