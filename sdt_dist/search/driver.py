"""Drives many searches at once and merges their requests into few large model calls.

See docs/architecture/search.md.

A `Crew` is searches under way in rounds: take what they wait for, answer it, let them go on. `drive` answers in this
process; a fleet's searcher answers the same rounds with a remote model. It has no threads and repeats exactly: a
problem's requests, keys and rewards do not depend on the problems beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from sdt_dist.dispatch import dispatch
from sdt_dist.errors import RewardError, SdtError
from sdt_dist.protocols import Process, Root
from sdt_dist.rewards.checking import checked_partial, weighted_sum
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import Reply, Request, ScoreRequest, Scores, Session
from sdt_dist.values.records import ValueStore
from sdt_dist.values.store import EvidenceStore

Search = Generator[list[Request], list[Reply], SearchResult]
Progress = Callable[[int, int], None]


@dataclass(eq=False)
class Running:
    """A search between two rounds: the requests it waits for."""

    session: Session
    search: Search
    pending: list[Request] = field(default_factory=list)

    @property
    def waits_for_single_steps(self) -> bool:
        """Whether one forward pass answers each request, or none does."""
        return all(request.is_single_step for request in self.pending)


@dataclass(frozen=True, slots=True)
class Ended:
    """A search that is over, with its result or its own error."""

    session: Session
    outcome: SearchResult | SdtError


class Round:
    """What some searches of a crew wait for: `requests` in one list, to be answered in the same order."""

    def __init__(self, members: Sequence[Running]) -> None:
        self.members = list(members)
        self.requests: list[Request] = [
            request for member in self.members for request in member.pending
        ]

    def by_member(self, replies: Sequence[Reply]) -> list[list[Reply]]:
        """The replies to `requests`, a list a member."""
        rest = iter(replies)
        return [[next(rest) for _ in member.pending] for member in self.members]


class Crew:
    """Searches under way together; whoever holds it answers their rounds, one at a time.

    release: told the root of a problem when the last search that shares its caches is over.
    """

    def __init__(
        self, release: Callable[[Root], None], on_progress: Progress | None = None
    ) -> None:
        self._release = release
        self._on_progress = on_progress
        self.running: list[Running] = []

    def add(self, session: Session, search: Search) -> Ended | None:
        """Start a search; an Ended when it needed no model at all."""
        member = Running(session, search)
        outcome = _advance(member, None)
        if outcome is not None:
            return self._close(member, outcome)
        self.running.append(member)
        return None

    def next_round(self) -> Round:
        """Searches to answer now: those that wait for single steps only, else all.

        A single step is one forward pass and brings its search nearer to its rollouts, so that in the end the rollouts
        of all searches decode together.
        """
        stepping = [member for member in self.running if member.waits_for_single_steps]
        return Round(stepping or self.running)

    def resume(
        self, members: Sequence[Running], replies: Sequence[list[Reply]], wall_s: float
    ) -> list[Ended]:
        """Let searches go on with the replies to what they waited for; they share its wall time and their own."""
        begin = time.monotonic()
        outcomes = [
            _advance(member, answer) for member, answer in zip(members, replies, strict=True)
        ]
        share = (wall_s + time.monotonic() - begin) / max(len(members), 1)
        ended = []
        for member, outcome in zip(members, outcomes, strict=True):
            member.session.budget.wall_s += share
            if self._on_progress is not None:
                self._on_progress(member.session.problem.index, member.session.budget.rollouts)
            if outcome is not None:
                ended.append(self._remove(member, outcome))
        return ended

    def fail(self, members: Sequence[Running], error: SdtError) -> list[Ended]:
        """End searches whose requests cannot be answered."""
        for member in members:
            member.search.close()
        return [self._remove(member, error) for member in members]

    def _remove(self, member: Running, outcome: SearchResult | SdtError) -> Ended:
        self.running.remove(member)
        return self._close(member, outcome)

    def _close(self, member: Running, outcome: SearchResult | SdtError) -> Ended:
        root = member.session.root
        in_use = {other.session.root.digest for other in self.running}
        if root.digest not in in_use:  # a team's searches share their caches
            self._release(root)
        if isinstance(outcome, SearchResult):
            outcome = replace(outcome, cost=member.session.budget.cost())
        return Ended(member.session, outcome)


def drive(
    process: Process,
    searches: Iterator[tuple[Session, Search]],
    *,
    in_flight: int,
    on_progress: Progress | None = None,
    store: ValueStore | None = None,
) -> Iterator[tuple[int, SearchResult | SdtError]]:
    """Run searches, at most `in_flight` together; yields (problem index, result or its error) as each ends.

    A search that ends by an SdtError of its own (a reward's, a context's) does not disturb the others.
    `on_progress(problem index, rollouts so far)` is called after every round. `store` is where searches of one problem
    exchange evidence; default: one of this call's own.
    """
    handlers = {
        "expand": process.expand,
        "rollout": process.rollout,
        "share": (store or EvidenceStore()).exchange,
    }
    crew = Crew(process.release, on_progress)
    waiting = True
    while waiting or crew.running:
        while waiting and len(crew.running) < in_flight:
            entry = next(searches, None)
            waiting = entry is not None
            if entry is not None and (ended := crew.add(*entry)) is not None:
                yield ended.session.problem.index, ended.outcome
        begin = time.monotonic()
        this = crew.next_round()
        replies = this.by_member(dispatch(this.requests, handlers))
        for ended in crew.resume(this.members, replies, time.monotonic() - begin):
            yield ended.session.problem.index, ended.outcome


def _advance(member: Running, replies: list[Reply] | None) -> SearchResult | SdtError | None:
    """Resume a search until it waits for the model or a store; rewards are answered on the way."""
    session = member.session
    handlers = {"score": lambda asked: [_score(session, request) for request in asked]}
    try:
        requests = member.search.send(replies) if replies is not None else next(member.search)
        while all(request.kind == "score" for request in requests):
            requests = member.search.send(dispatch(requests, handlers))
    except StopIteration as stop:
        return stop.value
    except SdtError as error:
        member.search.close()
        return error
    member.pending = requests
    return None


def _score(session: Session, request: ScoreRequest) -> Scores:
    """Decode and score sequences of one problem; RewardError names the problem, the reward and what is wrong."""
    problem = session.problem
    decoded = session.states.decode(session.root, request.sequences)
    try:
        if request.partial:
            return Scores(checked_partial(problem.reward, decoded), {}, decoded)
        rewards, components = weighted_sum(problem.reward, decoded)
    except RewardError as error:
        raise RewardError(f"problem {problem.index}: {error}") from error
    return Scores(rewards, components, decoded)
