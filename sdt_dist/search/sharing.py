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
from sdt_dist.values.catalogue import Catalogue
from sdt_dist.values.estimate import Estimate, exact, places, shared_estimate
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
        searchers = range(membership.searchers)
        self._team: dict[int, list[WalkRecord]] = {s: [] for s in searchers}  # walks by searcher
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
        self._tickets = [] if self._ended else self._next_tickets()
        self._ended = not self._tickets
        return self._tickets

    def _next_tickets(self) -> list[int]:
        """The lowest tickets of the own share that no walk holds, as many as may start now."""
        own = self._team[self.membership.searcher]
        taken = {walk.ticket for walk in own}
        earlier_nfe = sum(walk.nfe for walk in own if walk.stream != self.membership.stream)
        num_walks = self._allowed(len(taken), earlier_nfe)
        every = count() if self._limit is None else range(self._limit)
        missing = (ticket for ticket in every if ticket not in taken)
        return list(islice(missing, num_walks))

    def _allowed(self, num_taken: int, earlier_nfe: int) -> int:
        """How many walks to start now, given what earlier incarnations of this searcher did."""
        session = self.session
        max_nfe = None if self._max_nfe is None else self._max_nfe - earlier_nfe
        if max_nfe is not None and max_nfe <= 0:
            return 0
        num_rollouts = None
        if self._limit is not None:
            num_rollouts = session.budget.rollouts + self._limit - num_taken
        update = {"num_rollouts": num_rollouts, "max_nfe": max_nfe}
        session.options = self.options.model_copy(update=update)
        return session.next_wave(self.options.wave_size)

    def _wave(self) -> Asking:
        """Walks of all planned tickets, selected on the tree as it stands: their vectors are what is in it now."""
        session = self.session
        evidence = self.evidence
        # 1. S_i, the same for all: what the tree has before any of these walks.
        known = dict(evidence.known)
        # 2. Down to residual arms; omega_i follows from the arms.
        walks = []
        for number, ticket in enumerate(self._tickets, self._own):
            walks.append(self._start(ticket, number))
        for walk in walks:
            self._select(evidence.tree, walk)
        # 3. One new sequence x_i each.
        requests = [rollout_request(session, evidence.tree, walk, fresh=True) for walk in walks]
        rollouts = yield from session.roll_out(requests)
        steps: list[Steps] = []
        for walk, request, rollout in zip(walks, requests, rollouts, strict=True):
            steps.append(evidence.steps(walk.node, request.excluded, rollout))
        # 4. r(x_i).
        sequences: list[tuple[int, ...]] = []
        log_probs: list[float] = []
        for tokens, log_prob, _, _ in steps:
            sequences.append(tuple(tokens.tolist()))
            log_probs.append(float(log_prob.sum()))
        reasons: list[FinishReason] = [session.states.finish_reason(x) for x in sequences]
        samples = yield from session.score(sequences, log_probs, reasons)
        for walk, sample in zip(walks, samples, strict=True):
            walk.sample = sample
        # 5. The walks join the tree, as their records.
        records = []
        for walk, step, rollout in zip(walks, steps, rollouts, strict=True):
            number = self._own + len(records)
            records.append(self._record(walk, number, known, step, rollout.cost.nfe))
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
        self,
        walk: Walk,
        number: int,  # in the own stream
        known: dict[str, int],  # what its tree had, by stream
        steps: Steps,  # of n tokens
        nfe: int,
    ) -> WalkRecord:
        sample = self.session.finished[walk.sample]
        return WalkRecord(
            self.membership.stream,
            number,
            walk.ticket,
            *steps,
            components=sample.components,
            log_omega=walk.log_omega,
            known=known,
            noise=int(walk.arm_key),
            nfe=nfe,
        )

    def _exchange(self) -> Asking:
        """Publish what the store lacks, others' walks included, and join what is new."""
        evidence = self.evidence
        member = self.membership
        known = dict(evidence.known)
        lacking = () if covers(self._held, known) else evidence.walks
        publish = tuple(walk for walk in lacking if walk.number >= self._held.get(walk.stream, 0))
        request = ShareRequest(member.key, member.team, publish, known, self._closing())
        (reply,) = yield [request]
        assert isinstance(reply, Shared)
        self._held = dict(reply.held)
        self._stored_closed = dict(reply.closed)
        for stream, length in reply.closed.items():
            self._closed[stream] = max(length, self._closed.get(stream, 0))
        self._join(reply.walks)

    def _closing(self) -> dict[str, int]:
        """Closed streams as far as known; at the end all of this searcher's, with what was seen of them."""
        if not self._ended:
            return dict(self._closed)
        mine = {self.membership.stream: 0}
        for walk in self._team[self.membership.searcher]:
            mine[walk.stream] = walk.number + 1
        return self._closed | mine

    def _is_settled(self) -> bool:
        """Whether the store holds all that is known here."""
        closing = self._closing()
        named = closing.keys() <= self._stored_closed.keys()
        closed = named and covers(self._stored_closed, closing)
        return closed and covers(self._held, self.evidence.known)

    def report(self) -> TeamReport:
        """Whose shares are missing, and what each stream of the team cost."""
        paid: dict[str, tuple[int, int]] = {}
        for walks in self._team.values():
            for walk in walks:
                num_walks, nfe = paid.get(walk.stream, (0, 0))
                paid[walk.stream] = (num_walks + 1, nfe + walk.nfe)
        missing = () if self.evidence.is_exhausted else self._missing()
        return TeamReport(self.membership.stream, missing, paid)

    def _missing(self) -> tuple[int, ...]:
        """Searchers that have neither ended nor done all of their share, as far as is known here."""
        missing = []
        for searcher in self._team:
            if not self._has_ended(searcher) and not self._is_whole(searcher):
                missing.append(searcher)
        return tuple(missing)

    def _has_ended(self, searcher: int) -> bool:
        """Whether a searcher has closed its streams and all of what it then knew of them is here."""
        closed = {}
        for stream, length in self._closing().items():
            if int(stream.rsplit("/", 2)[1]) == searcher:
                closed[stream] = length
        return bool(closed) and covers(self.evidence.known, closed)

    def _is_whole(self, searcher: int) -> bool:
        """Whether all tickets of a searcher's share are there."""
        limit = self.options.rollout_limit
        if limit is None:
            return False
        share = share_of(limit, searcher, self.membership.searchers)
        taken = {walk.ticket for walk in self._team[searcher]}
        return taken >= set(range(share))

    def is_fixed(self) -> bool:
        """Whether the number of tickets was fixed in advance and all are there: without it Z-hat is consistent only."""
        options = self.options
        limit = options.rollout_limit
        if limit is None or options.time_budget_s is not None:
            return False
        if not all(self._is_whole(searcher) for searcher in self._team):
            return False
        if options.max_nfe is None:
            return True
        # an nfe budget that no share of tickets can use up has stopped nothing
        searchers = self.membership.searchers
        length = self.session.states.max_new_tokens
        for searcher in self._team:
            most_nfe = share_of(limit, searcher, searchers) * length
            if most_nfe > share_of(options.max_nfe, searcher, searchers):
                return False
        return True

    def estimate(self) -> tuple[Estimate, Catalogue]:
        """The estimate from all that is known, the same bits for members that know the same walks."""
        # 1. One order of walks for all members, and the sequences in the order of their tokens.
        walks = sorted(self.evidence.walks, key=lambda walk: (walk.stream, walk.number))
        catalogue = Catalogue.of(walks, self.evidence.multipliers)
        inverse_temperature = self.options.inverse_temperature
        # 2. Every sequence found: W = p E, Z-hat = Z.
        if self.evidence.is_exhausted:
            log_tilts = inverse_temperature * catalogue.rewards
            return exact(catalogue.log_priors, log_tilts), catalogue
        # 3. Otherwise Z-hat = sum_i c_i t_i in the order of places, walks of earlier teams first.
        place = places(walks, self.membership.team)
        return shared_estimate(walks, place, catalogue, inverse_temperature), catalogue


def _salt(warm: tuple[WalkRecord, ...]) -> str:
    """Names the noise of the evidence that a search starts from, so that none of its walks repeats any of it."""
    noise = np.unique(np.array([walk.noise for walk in warm], dtype=np.uint64))
    return hashlib.blake2b(noise.tobytes(), digest_size=16).hexdigest() if warm else ""
