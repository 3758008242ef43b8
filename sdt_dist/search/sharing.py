"""One member of a team that searches a problem together, or from earlier evidence.

See docs/concepts/exactness.md, docs/concepts/exactness.md#shared-evidence.

A member grows its own tree from every walk it knows, its own and others'; before each wave it exchanges walks with a
store. Walk k of searcher s holds ticket (k, s), place k*S + s of the team's N, after all earlier teams' walks: fixed in
advance. It must not know where the store is, nor the other members.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable
from itertools import count, islice

import numpy as np

from sdt_dist.errors import ConfigurationError, FleetError
from sdt_dist.protocols import FinishReason
from sdt_dist.search.loop import Walk, rollout_request
from sdt_dist.search.options import TreeOptions
from sdt_dist.search.session import Reply, Request, Session
from sdt_dist.tree.tree import Tree
from sdt_dist.values.estimate import Catalogue, Estimate, exact, places, shared_estimate
from sdt_dist.values.records import Membership, Shared, ShareRequest, TeamReport, WalkRecord, covers
from sdt_dist.values.tree import EvidenceTree, Steps

_PATIENCE = 100  # exchanges after which a store that still lacks walks is given up
Asking = Generator[list[Request], list[Reply], None]
Select = Callable[[Tree, Walk], None]


def share_of(total: int, searcher: int, searchers: int) -> int:
    """How much of a budget one of a team's searchers has."""
    return total // searchers + (searcher < total % searchers)


class Member:
    """A team member under way: the evidence it knows, its tickets, and what the store has of it.

    `select` moves a walk to the node of a residual arm and notes its omega. ConfigurationError when the budget gives
    some searcher no rollout, or when earlier evidence has other reward terms.
    """

    def __init__(self, session: Session, membership: Membership, select: Select) -> None:
        assert isinstance(session.options, TreeOptions)
        self.session = session
        self.membership = membership
        self._select = select
        self.options = session.options
        self._limit = self._share(self.options.rollout_limit)
        self._max_nfe = self._share(self.options.max_nfe)
        self.evidence = EvidenceTree(
            self.options.inverse_temperature, session.problem.reward.multipliers
        )
        # walks by searcher
        self._team: dict[int, list[WalkRecord]] = {s: [] for s in range(membership.searchers)}
        self._join(membership.warm)
        self._own = 0  # walks in the own stream
        self._ended = False
        self._held: dict[str, int] = {}
        self._closed: dict[str, int] = {}
        self._stored_closed: dict[str, int] = {}
        self._salt = _salt(membership.warm)
        self._tickets: list[int] = []

    def _share(self, total: int | None) -> int | None:
        member = self.membership
        if total is not None and total < member.searchers:
            raise ConfigurationError(
                f"searchers_per_problem: {member.searchers}, allowed at most {total}, so that each has something to do; "
                "raise num_rollouts and max_nfe."
            )
        return None if total is None else share_of(total, member.searcher, member.searchers)

    def grow(self) -> Asking:
        """Exchange and search until the own share is done or nothing is left, then until the store holds all of it."""
        yield from self._exchange()
        while not self.evidence.is_exhausted and self._plan():
            yield from self._wave()
            self._plan()
            yield from self._exchange()
        self._ended = True
        for _ in range(_PATIENCE):
            if self._is_settled():
                self.session.options = self.options
                return
            yield from self._exchange()
        raise FleetError(
            f"evidence: after {_PATIENCE} exchanges the store still lacks walks of {self.membership.stream!r}; is it "
            "restarting again and again? Start the search again."
        )

    def _join(self, walks: Iterable[WalkRecord]) -> None:
        before = len(self.evidence.walks)
        self.evidence.join(walks)
        for walk in self.evidence.walks[before:]:
            if walk.team == self.membership.team:
                self._team[walk.searcher].append(walk)

    def _plan(self) -> list[int]:
        """The tickets of the next wave; none when the share is done, and then none for ever."""
        own = self._team[self.membership.searcher]
        taken = {walk.ticket for walk in own}
        earlier_nfe = sum(walk.nfe for walk in own if walk.stream != self.membership.stream)
        every = count() if self._limit is None else range(self._limit)
        missing = (ticket for ticket in every if ticket not in taken)
        self._tickets = (
            [] if self._ended else list(islice(missing, self._allowed(len(taken), earlier_nfe)))
        )
        self._ended = not self._tickets
        return self._tickets

    def _allowed(self, num_taken: int, earlier_nfe: int) -> int:
        """How many walks to start now, given what earlier incarnations of this searcher did."""
        session = self.session
        left = None if self._limit is None else self._limit - num_taken
        max_nfe = None if self._max_nfe is None else self._max_nfe - earlier_nfe
        if max_nfe is not None and max_nfe <= 0:
            return 0
        session.options = self.options.model_copy(
            update={
                "num_rollouts": None if left is None else session.budget.rollouts + left,
                "max_nfe": max_nfe,
            }
        )
        return session.next_wave(self.options.wave_size)

    def _wave(self) -> Asking:
        """Walks of all planned tickets, selected on the tree as it stands: their vectors are what is in it now."""
        session = self.session
        tree = self.evidence.tree
        known = dict(self.evidence.known)
        walks = [self._start(ticket, self._own + i) for i, ticket in enumerate(self._tickets)]
        for walk in walks:
            self._select(tree, walk)
        requests = [rollout_request(session, tree, walk, fresh=True) for walk in walks]
        rollouts = yield from session.roll_out(requests)
        steps = [
            self.evidence.steps(walk.node, request.excluded, rollout)
            for walk, request, rollout in zip(walks, requests, rollouts, strict=True)
        ]
        sequences = [tuple(tokens.tolist()) for tokens, *_ in steps]
        log_probs = [float(log_prob.sum()) for _, log_prob, *_ in steps]
        reasons: list[FinishReason] = [
            session.states.finish_reason(sequence) for sequence in sequences
        ]
        for walk, index in zip(
            walks, (yield from session.score(sequences, log_probs, reasons)), strict=True
        ):
            walk.sample = index
        records = [
            self._record(walk, self._own + i, known, step, rollout.cost.nfe)
            for i, (walk, step, rollout) in enumerate(zip(walks, steps, rollouts, strict=True))
        ]
        session.budget.rollouts += len(walks)
        self._own += len(walks)
        self._join(records)

    def _start(self, ticket: int, number: int) -> Walk:
        """A walk whose noise no other walk has: keyed by searcher, incarnation and the evidence it started from."""
        member = self.membership
        key = self.session.key
        names = (member.searcher, member.incarnation, self._salt, number)
        return Walk(ticket, np.uint64(key("shared arms", *names)), key("shared p", *names))

    def _record(
        self, walk: Walk, number: int, known: dict[str, int], steps: Steps, nfe: int
    ) -> WalkRecord:
        return WalkRecord(
            self.membership.stream,
            number,
            walk.ticket,
            *steps,
            components=self.session.finished[walk.sample].components,
            log_omega=walk.log_omega,
            known=known,
            noise=int(walk.arm_key),
            nfe=nfe,
        )

    def _exchange(self) -> Asking:
        """Publish what the store lacks, others' walks included, and join what is new."""
        evidence = self.evidence
        member = self.membership
        lacking = () if covers(self._held, evidence.known) else evidence.walks
        publish = tuple(walk for walk in lacking if walk.number >= self._held.get(walk.stream, 0))
        request = ShareRequest(
            member.key, member.team, publish, dict(evidence.known), self._closing()
        )
        (reply,) = yield [request]
        assert isinstance(reply, Shared)
        self._held = dict(reply.held)
        self._stored_closed = dict(reply.closed)
        for stream, length in reply.closed.items():
            self._closed[stream] = max(length, self._closed.get(stream, 0))
        self._join(reply.walks)

    def _closing(self) -> dict[str, int]:
        """Closed streams as far as known; at the end all of this searcher's, with what was seen of them."""
        mine = (
            {walk.stream: walk.number + 1 for walk in self._team[self.membership.searcher]}
            if self._ended
            else {}
        )
        return self._closed | ({self.membership.stream: 0} if self._ended else {}) | mine

    def _is_settled(self) -> bool:
        """Whether the store holds all that is known here."""
        closing = self._closing()
        closed = closing.keys() <= self._stored_closed.keys() and covers(
            self._stored_closed, closing
        )
        return closed and covers(self._held, self.evidence.known)

    def report(self) -> TeamReport:
        """Whose shares are missing, and what each stream of the team cost."""
        paid: dict[str, tuple[int, int]] = {}
        for walk in (walk for walks in self._team.values() for walk in walks):
            walks, nfe = paid.get(walk.stream, (0, 0))
            paid[walk.stream] = (walks + 1, nfe + walk.nfe)
        missing = [s for s in self._team if not self._has_ended(s) and not self._is_whole(s)]
        return TeamReport(
            self.membership.stream, () if self.evidence.is_exhausted else tuple(missing), paid
        )

    def _has_ended(self, searcher: int) -> bool:
        """Whether a searcher has closed its streams and all of what it then knew of them is here."""
        closed = {s: n for s, n in self._closing().items() if int(s.rsplit("/", 2)[1]) == searcher}
        return bool(closed) and covers(self.evidence.known, closed)

    def _is_whole(self, searcher: int) -> bool:
        """Whether all tickets of a searcher's share are there."""
        limit = self.options.rollout_limit
        if limit is None:
            return False
        share = share_of(limit, searcher, self.membership.searchers)
        return {walk.ticket for walk in self._team[searcher]} >= set(range(share))

    def is_fixed(self) -> bool:
        """Whether the number of tickets was fixed in advance and all are there: without it Z-hat is consistent only."""
        options = self.options
        searchers = self.membership.searchers
        limit = options.rollout_limit
        max_nfe = options.max_nfe
        length = self.session.states.max_new_tokens
        if (
            limit is None
            or options.time_budget_s is not None
            or not all(map(self._is_whole, self._team))
        ):
            return False
        return max_nfe is None or all(
            share_of(limit, s, searchers) * length <= share_of(max_nfe, s, searchers)
            for s in self._team
        )

    def estimate(self) -> tuple[Estimate, Catalogue]:
        """The estimate from all that is known, the same bits for members that know the same walks."""
        strength = self.options.inverse_temperature
        walks = sorted(self.evidence.walks, key=lambda walk: (walk.stream, walk.number))
        catalogue = Catalogue.of(walks, self.evidence.multipliers)
        if self.evidence.is_exhausted:
            return exact(catalogue.log_priors, strength * catalogue.rewards), catalogue
        return shared_estimate(
            walks, places(walks, self.membership.team), catalogue, strength
        ), catalogue


def _salt(warm: tuple[WalkRecord, ...]) -> str:
    """Names the noise of the evidence that a search starts from, so that none of its walks repeats any of it."""
    noise = np.unique(np.array([walk.noise for walk in warm], dtype=np.uint64))
    return hashlib.blake2b(noise.tobytes(), digest_size=16).hexdigest() if warm else ""
