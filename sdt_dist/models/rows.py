"""A LogitsModel over any function from token sequences to next-token logits, with a row cache.

See docs/architecture/search.md.

The toy models and user objects with `LLMInterface` become backends through this; it knows no KV cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from sdt_dist.models.context import check_context
from sdt_dist.models.proposal import Flows, RowAsk, Step, expansion, rollout
from sdt_dist.models.reduction import law_scores
from sdt_dist.noise import position_key
from sdt_dist.protocols import (
    Cost,
    ExpandRequest,
    Expansion,
    Flow,
    PriorLaw,
    Rollout,
    RolloutRequest,
    Root,
)

State = tuple[bytes, tuple[int, ...]]


class RowModel(ABC):
    """Backend whose only ability is `compute_rows`; rows are cached per (problem, generated prefix).

    `cache_bytes` bounds the cache; the least recently used rows go first and are computed, and counted, again.
    """

    vocab_size: int
    max_context: int
    deterministic = True

    def __init__(self, cache_bytes: int = 256 << 20) -> None:
        self.nfe = 0
        self.model_calls = 0
        self._cache_bytes = cache_bytes
        self._rows: OrderedDict[State, np.ndarray] = OrderedDict()
        self._prefixes: dict[bytes, set[tuple[int, ...]]] = {}
        self._size_bytes = 0
        self._flows = Flows()

    def load_flow(self, flow: Flow) -> None:
        """Hold a flow, so that requests can have tilts by its identity."""
        self._flows.load(flow)

    def drop_flow(self, identity: str) -> None:
        """Forget a flow that no request will name any more."""
        self._flows.drop(identity)

    @abstractmethod
    def compute_rows(self, sequences: list[tuple[int, ...]]) -> tuple[np.ndarray, list[int]]:
        """Logits [B, V] of whole sequences (prompt included), and how many rows each forward pass held."""

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> list[Expansion]:
        for request in requests:
            check_context(request.root, len(request.tokens) + 1, self.max_context)
        rows, costs = self._scores([(r.root, r.tokens) for r in requests], law)
        asks = [RowAsk((r.root, r.tokens), r.key, r.excluded, r.tilt) for r in requests]
        found = self._flows.largest(rows, [r.num_children for r in requests], asks)
        return [expansion(*reply, cost) for reply, cost in zip(found, costs, strict=True)]

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]:
        for request in requests:
            check_context(request.root, len(request.tokens) + request.num_tokens, self.max_context)
        runs = [_Run(request) for request in requests]
        while active := [run for run in runs if run.wants_more(law)]:
            rows, costs = self._scores([(run.request.root, run.tokens()) for run in active], law)
            tokens, steps = self._flows.draw(rows, [run.ask() for run in active])
            for run, token, step, cost in zip(active, tokens, steps, costs, strict=True):
                run.take(token, step, cost)
        return [run.reply(law) for run in runs]

    def release(self, root: Root) -> None:
        for tokens in self._prefixes.pop(root.digest, ()):
            row = self._rows.pop((root.digest, tokens), None)
            self._size_bytes -= 0 if row is None else row.nbytes

    def _scores(
        self, states: Sequence[tuple[Root, tuple[int, ...]]], law: PriorLaw
    ) -> tuple[np.ndarray, list[Cost]]:
        """Scores [B, V] of states; each distinct state that is not cached is computed, and counted, once."""
        wanted = [(root.digest, tokens) for root, tokens in states]
        missing = {
            name: root.prompt + tokens
            for name, (root, tokens) in zip(wanted, states, strict=True)
            if name not in self._rows
        }
        found: dict[State, np.ndarray] = {}
        call_of: dict[State, int] = {}
        if missing:
            logits, rows_per_call = self.compute_rows(list(missing.values()))
            found = dict(zip(missing, logits, strict=True))
            calls = np.repeat(np.arange(len(rows_per_call)), rows_per_call) + self.model_calls
            call_of = dict(zip(missing, calls.tolist(), strict=True))
            self.nfe += len(missing)
            self.model_calls += len(rows_per_call)
        costs = [
            Cost(1, frozenset((call_of.pop(name),))) if name in call_of else Cost()
            for name in wanted
        ]
        rows = np.stack([found[name] if name in found else self._rows[name] for name in wanted])
        self._remember(wanted, found)
        return law_scores(rows, law), costs

    def _remember(self, wanted: Sequence[State], found: dict[State, np.ndarray]) -> None:
        for name in wanted:
            if name in self._rows:
                self._rows.move_to_end(name)
        for name, row in found.items():
            self._rows[name] = row
            self._prefixes.setdefault(name[0], set()).add(name[1])
            self._size_bytes += row.nbytes
        while self._size_bytes > self._cache_bytes and self._rows:
            self._size_bytes -= self._rows.popitem(last=False)[1].nbytes


class _Run:
    """One rollout under way: its request, the steps taken and what they cost."""

    def __init__(self, request: RolloutRequest) -> None:
        self.request = request
        self.generated: list[int] = []
        self.steps: list[Step[float]] = []
        self.costs: list[Cost] = []

    def tokens(self) -> tuple[int, ...]:
        return (*self.request.tokens, *self.generated)

    def wants_more(self, law: PriorLaw) -> bool:
        return len(self.generated) < self.request.num_tokens and not self._ended(law)

    def _ended(self, law: PriorLaw) -> bool:
        return bool(self.generated) and self.generated[-1] in law.end_tokens

    def ask(self) -> RowAsk:
        """What its next row is asked."""
        request = self.request
        step = len(self.generated)
        key = None if request.key is None else position_key(request.key, step)
        return RowAsk(
            (request.root, self.tokens()), key, () if step else request.excluded, request.tilt
        )

    def take(self, token: int, step: Step, cost: Cost) -> None:
        self.generated.append(token)
        self.steps.append(step)
        self.costs.append(cost)

    def reply(self, law: PriorLaw) -> Rollout:
        cost = Cost(
            sum(c.nfe for c in self.costs), frozenset().union(*(c.calls for c in self.costs))
        )
        return rollout(
            self.generated,
            self.steps,
            "eos" if self._ended(law) else "length",
            cost,
            self.request.tilt,
        )
