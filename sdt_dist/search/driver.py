"""Drives many searches at once and merges their requests into few large model calls (SPEC section 3).

The same generators run here and in a fleet's searcher. It has no threads and repeats exactly: a problem's
requests, keys and rewards do not depend on the problems beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from sdt_dist.errors import RewardError, SdtError
from sdt_dist.protocols import ExpandRequest, Process, RolloutRequest
from sdt_dist.rewards.checking import checked_partial, weighted_sum
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import Reply, Request, ScoreRequest, Scores, Session

Search = Generator[list[Request], list[Reply], SearchResult]
Progress = Callable[[int, int], None]


@dataclass
class _Running:
    """A search between two rounds: the requests it waits for."""

    session: Session
    search: Search
    pending: list[Request]


def drive(
    process: Process,
    searches: Iterator[tuple[Session, Search]],
    *,
    in_flight: int,
    on_progress: Progress | None = None,
) -> Iterator[tuple[int, SearchResult | SdtError]]:
    """Run searches, at most `in_flight` together; yields (problem index, result or its error) as each ends.

    A search that ends by an SdtError of its own (a reward's, a context's) does not disturb the others.
    `on_progress(problem index, rollouts so far)` is called after every round.
    """
    running: list[_Running] = []
    waiting = True
    while waiting or running:
        while waiting and len(running) < in_flight:
            entry = next(searches, None)
            if entry is None:
                waiting = False
                break
            state = _Running(*entry, [])
            outcome = _advance(state, None)
            if outcome is None:
                running.append(state)
            else:
                yield _close(process, state, outcome)
        begin = time.monotonic()
        chosen = _next_round(running)
        replies = _answer(process, chosen)
        outcomes = [_advance(state, answer) for state, answer in zip(chosen, replies, strict=True)]
        share = (time.monotonic() - begin) / max(len(chosen), 1)
        ended = set()
        for state, outcome in zip(chosen, outcomes, strict=True):
            state.session.wall_s += share
            if on_progress is not None:
                on_progress(state.session.problem.index, state.session.rollouts)
            if outcome is not None:
                ended.add(id(state))
                yield _close(process, state, outcome)
        running = [state for state in running if id(state) not in ended]


def _next_round(running: list[_Running]) -> list[_Running]:
    """Searches to answer now: those that wait for single steps only, else all.

    A single step is one forward pass and brings its search nearer to its rollouts, so that in the end the rollouts of
    all searches decode together.
    """
    return [s for s in running if all(map(_is_single_step, s.pending))] or running


def _is_single_step(request: Request) -> bool:
    return isinstance(request, ExpandRequest) or (isinstance(request, RolloutRequest) and request.num_tokens == 1)


def _close(process: Process, state: _Running, outcome: SearchResult | SdtError) -> tuple[int, SearchResult | SdtError]:
    process.release(state.session.root)
    if isinstance(outcome, SearchResult):
        outcome = replace(outcome, cost=state.session.cost())
    return state.session.problem.index, outcome


def _advance(state: _Running, replies: list[Reply] | None) -> SearchResult | SdtError | None:
    """Resume a search until it waits for the model; rewards are answered on the way."""
    try:
        requests = state.search.send(replies) if replies is not None else next(state.search)
        while all(isinstance(request, ScoreRequest) for request in requests):
            requests = state.search.send([_score(state.session, r) for r in requests])  # type: ignore[arg-type]
    except StopIteration as stop:
        return stop.value
    except SdtError as error:
        state.search.close()
        return error
    state.pending = requests
    return None


def _answer(process: Process, running: Sequence[_Running]) -> list[list[Reply]]:
    """One expand call and one rollout call for everything that all running searches wait for."""
    places = [(i, j, request) for i, state in enumerate(running) for j, request in enumerate(state.pending)]
    expands = [(i, j, request) for i, j, request in places if isinstance(request, ExpandRequest)]
    rollouts = [(i, j, request) for i, j, request in places if isinstance(request, RolloutRequest)]
    replies: dict[tuple[int, int], Reply] = {}
    if expands:
        expansions = process.expand([request for _, _, request in expands])
        replies |= {(i, j): reply for (i, j, _), reply in zip(expands, expansions, strict=True)}
    if rollouts:
        finished = process.rollout([request for _, _, request in rollouts])
        replies |= {(i, j): reply for (i, j, _), reply in zip(rollouts, finished, strict=True)}
    return [[replies[i, j] for j in range(len(state.pending))] for i, state in enumerate(running)]


def _score(session: Session, request: ScoreRequest) -> Scores:
    """Decode and score sequences of one problem; RewardError names the problem, the reward and what is wrong."""
    problem = session.problem
    decoded = session.process.decode(session.root, request.sequences)
    try:
        if request.partial:
            return Scores(checked_partial(problem.reward, decoded), {}, decoded)
        rewards, components = weighted_sum(problem.reward, decoded)
    except RewardError as error:
        raise RewardError(f"problem {problem.index}: {error}") from error
    return Scores(rewards, components, decoded)
