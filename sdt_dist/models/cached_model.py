"""`CachedModel`: a LogitsModel over a decoder, whatever library that computes with.

See docs/architecture/search.md.

A prompt is encoded once and shared by its whole tree; generated tokens' KV are kept in a prefix cache with a byte
budget; the decode loop feeds one token a row and step, rows of many problems and depths together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sdt_dist.models.context import check_context
from sdt_dist.models.decoder import Batch, Decoder, Prompt
from sdt_dist.models.prefix_cache import PrefixCache
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

_Reduce = Callable[[list[int], np.ndarray], list[int]]


class CachedModel:
    """Batched scoring and rollouts; counters and errors as in `protocols.LogitsModel`.

    Backends derive from it and only choose a decoder. cache_bytes bounds the keys and values of generated tokens;
    prompts are kept until `release`. deterministic: whether a row's bits do not depend on its batch.

    `prefix_tokens` counts the positions before the rows that requests asked for (prompt and known tokens),
    `reused_tokens` those of them whose keys and values were there already: encoded prompts, cached known tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        vocab_size: int,
        max_context: int,
        deterministic: bool,
        cache_bytes: int,
    ) -> None:
        self._decoder = decoder
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.deterministic = deterministic
        self.nfe = self.model_calls = self.recomputed_tokens = 0
        self.prefix_tokens = self.reused_tokens = 0
        self._prompts: dict[bytes, Prompt] = {}
        self._cache = PrefixCache(cache_bytes)
        self._flows = Flows()

    def load_flow(self, flow: Flow) -> None:
        """Hold a flow, so that requests can have tilts by its identity."""
        self._flows.load(flow)

    def drop_flow(self, identity: str) -> None:
        """Forget a flow that no request will name any more."""
        self._flows.drop(identity)

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> list[Expansion]:
        runs = [_Run(request.root, request.tokens, 1) for request in requests]
        found: dict[int, tuple[np.ndarray, Step]] = {}

        def reduce(rows: list[int], scores: np.ndarray) -> list[int]:
            asked = [requests[row] for row in rows]
            asks = [RowAsk((r.root, r.tokens), r.key, r.excluded, r.tilt) for r in asked]
            found.update(
                zip(
                    rows,
                    self._flows.largest(scores, [r.num_children for r in asked], asks),
                    strict=True,
                )
            )
            return [-1] * len(rows)

        self._run(runs, law, reduce)
        return [expansion(*found[row], run.cost()) for row, run in enumerate(runs)]

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]:
        runs = [_Run(request.root, request.tokens, request.num_tokens) for request in requests]

        def reduce(rows: list[int], scores: np.ndarray) -> list[int]:
            tokens, steps = self._flows.draw(scores, [runs[row].ask(requests[row]) for row in rows])
            for row, step in zip(rows, steps, strict=True):
                runs[row].steps.append(step)
            return tokens

        self._run(runs, law, reduce)
        return [run.rollout(law, request) for run, request in zip(runs, requests, strict=True)]

    def release(self, root: Root) -> None:
        self._prompts.pop(root.digest, None)
        self._cache.release(root)

    def _run(self, runs: list[_Run], law: PriorLaw, reduce: _Reduce) -> None:
        """Generate until every run has its tokens; `reduce` turns scores [B, V] of rows into their next tokens."""
        for run in runs:
            check_context(run.root, len(run.known) + run.num_tokens, self.max_context)
        for run in runs:
            run.prompt = self._prompt(run)
        at_root = [i for i, run in enumerate(runs) if not run.known]
        if at_root:
            self._reduce(
                runs, at_root, np.stack([runs[i].prompt.logits for i in at_root]), law, reduce
            )
        active = [i for i, run in enumerate(runs) if run.wants_more(law)]
        if not active:
            return
        batch = self._open([runs[i] for i in active])
        while active:
            logits = batch.feed([runs[i].next_token() for i in active])
            self._count([runs[i] for i in active], batch.calls_per_feed)
            ready = [place for place, i in enumerate(active) if not runs[i].pending]
            if ready:
                wanted = logits if len(ready) == len(active) else logits[ready]
                self._reduce(runs, [active[place] for place in ready], wanted, law, reduce)
            working = [place for place, i in enumerate(active) if runs[i].wants_more(law)]
            active, batch = self._leave(runs, active, working, batch)

    def _leave(
        self, runs: list[_Run], active: list[int], working: list[int], batch: Batch
    ) -> tuple[list[int], Batch]:
        """Drop finished rows from the batch, keeping their KV; the batch shrinks at once."""
        if len(working) == len(active):
            return active, batch
        for place in set(range(len(active))) - set(working):
            self._keep(runs[active[place]], batch.values(place))
        if working:
            batch.select(working)
        return [active[place] for place in working], batch

    def _keep(self, run: _Run, values: np.ndarray | None) -> None:
        if values is not None and values.shape[3] > run.reused:
            tokens = (*run.known, *run.generated)
            self._cache.add(run.root.digest, tokens, run.reused, values[:, :, :, run.reused :])

    def _open(self, runs: list[_Run]) -> Batch:
        known = []
        for run in runs:
            pieces = self._cache.find(run.root.digest, run.known[:-1]) if run.known else []
            run.reused = sum(piece.shape[3] for piece in pieces)
            run.pending = [*run.known[run.reused :], *run.generated]
            self._count_prefix(len(run.known), run.reused)
            known.append(pieces)
        capacity = max(len(run.known) + run.num_tokens for run in runs)
        prompts = [run.prompt for run in runs]
        return self._decoder.open(prompts, known, capacity)

    def _prompt(self, run: _Run) -> Prompt:
        """The problem's encoded prompt; whoever needs it first pays its one NFE, and its search does so only once."""
        prompt = self._prompts.get(run.root.digest)
        length = len(run.root.prompt)
        self._count_prefix(length, 0 if prompt is None else length)
        if prompt is None:
            prompt = self._prompts[run.root.digest] = self._decoder.encode(run.root.prompt)
            nfe, again = (0, length) if run.root.paid else (1, 0)
            run.pay(nfe=nfe, calls=range(self.model_calls, self.model_calls + 1), recomputed=again)
            self.nfe = self.nfe + nfe
            self.model_calls = self.model_calls + 1
            self.recomputed_tokens += again
        return prompt

    def _reduce(
        self, runs: list[_Run], rows: list[int], logits: np.ndarray, law: PriorLaw, reduce: _Reduce
    ) -> None:
        scores = law_scores(logits, law)
        for row, token in zip(rows, reduce(rows, scores), strict=True):
            runs[row].take(token)

    def _count(self, fed: list[_Run], num_calls: int) -> None:
        """One feed: rows whose next distribution is wanted are NFE, the others were encoded before."""
        calls = range(self.model_calls, self.model_calls + num_calls)
        self.model_calls += num_calls
        for run in fed:
            wanted = not run.pending
            run.pay(nfe=int(wanted), calls=calls, recomputed=int(not wanted))
            self.nfe += int(wanted)
            self.recomputed_tokens += int(not wanted)

    def _count_prefix(self, needed: int, reused: int) -> None:
        self.prefix_tokens += needed
        self.reused_tokens += reused


class _Run:
    """One row's way through a call: what it knows, what it generated, what it still has to feed, what it cost."""

    def __init__(self, root: Root, known: tuple[int, ...], num_tokens: int) -> None:
        self.root = root
        self.known = known
        self.num_tokens = num_tokens
        self.prompt: Prompt
        self.pending: list[int] = []
        self.generated: list[int] = []
        self.steps: list[Step[float]] = []
        self.reused = 0
        self._nfe = self._recomputed = 0
        self._calls: set[int] = set()

    def next_token(self) -> int:
        return self.pending.pop(0)

    def take(self, token: int) -> None:
        self.generated.append(token)
        self.pending.append(token)

    def wants_more(self, law: PriorLaw) -> bool:
        ended = bool(self.generated) and self.generated[-1] in law.end_tokens
        return len(self.generated) < self.num_tokens and not ended

    def pay(self, *, nfe: int, calls: range, recomputed: int = 0) -> None:
        self._nfe += nfe
        self._recomputed += recomputed
        self._calls.update(calls)

    def cost(self) -> Cost:
        return Cost(self._nfe, frozenset(self._calls), self._recomputed)

    def ask(self, request: RolloutRequest) -> RowAsk:
        """What its next row is asked."""
        step = len(self.generated)
        key = None if request.key is None else position_key(request.key, step)
        state = (
            self.root,
            (*self.known, *self.generated) if request.tilt is not None else self.known,
        )
        return RowAsk(state, key, () if step else request.excluded, request.tilt)

    def rollout(self, law: PriorLaw, request: RolloutRequest) -> Rollout:
        ended = bool(self.generated) and self.generated[-1] in law.end_tokens
        return rollout(
            self.generated, self.steps, "eos" if ended else "length", self.cost(), request.tilt
        )
