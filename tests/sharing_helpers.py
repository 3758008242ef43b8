"""Shared by the tests of shared evidence: teams on toys, driven in any order, over stores that lose things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sdt_dist.dispatch import dispatch
from sdt_dist.errors import SdtError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.search.api import open_search, run_searches
from sdt_dist.search.driver import Crew
from sdt_dist.search.methods import validate_options
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from sdt_dist.search.sharing_plan import SharingPlan
from sdt_dist.values.records import Membership, Shared, ShareRequest, WalkRecord
from sdt_dist.values.store import EvidenceStore
from tests.search_helpers import PARAMETERS

KEY = "k"


def run_teams(
    name: str,
    num_rollouts: int | None,
    searchers: int,
    *,
    runs: int = 1,
    seed: int = 1,
    in_flight: int = 8,
    warm: EvidenceStore | None = None,
    run: str = "r",
    reward=None,
    **options,
) -> list[SearchResult]:
    """`runs` problems on one toy, each by a team; every problem has a key of its own, "0", "1", ..."""
    model = Toy(*PARAMETERS[name])
    process = TokenProcess(model, model.law, model.length)
    problems = [SearchProblem(i, process.root([0]), reward or model) for i in range(runs)]
    given = {"inverse_temperature": model.inverse_temperature, "wave_size": 1} | options
    if num_rollouts is not None:
        given["num_rollouts"] = num_rollouts
    plan = SharingPlan(run, {p.index: str(p.index) for p in problems}, searchers, warm)
    outcomes = list(
        run_searches(
            process,
            problems,
            method="residual_ts",
            options=given,
            seed=seed,
            in_flight=in_flight,
            sharing=plan,
        )
    )
    results = [outcome for _, outcome in sorted(outcomes, key=lambda pair: pair[0])]
    for outcome in results:
        if isinstance(outcome, SdtError):
            raise outcome
    return results  # type: ignore[return-value]


class Team:
    """Members of one problem, each in a crew of its own, stepped one round at a time in any order."""

    def __init__(self, name: str, store, *, seed: int = 0, index: int = 0, **options) -> None:
        model = Toy(*PARAMETERS[name])
        self.model = model
        self.store = store
        self.seed = seed
        self.process = TokenProcess(model, model.law, model.length)
        self.problem = SearchProblem(index, self.process.root([0]), model)
        given = {"inverse_temperature": model.inverse_temperature, "wave_size": 1} | options
        self.options = validate_options("residual_ts", given)
        self.crews: dict[tuple[int, int], Crew] = {}
        self.results: list[SearchResult] = []

    def start(
        self, searcher: int, searchers: int, incarnation: int = 0, warm: Sequence[WalkRecord] = ()
    ) -> None:
        membership = Membership(
            KEY, f"r/{self.problem.index}", searcher, searchers, incarnation, tuple(warm)
        )
        entry = open_search(
            self.process,
            self.problem,
            method="residual_ts",
            options=self.options,
            seed=self.seed,
            membership=membership,
            cache_name=f"{searcher}/{incarnation}",
        )
        crew = self.crews[searcher, incarnation] = Crew(self.process.release)
        assert crew.add(*entry) is None

    def step(self, member: tuple[int, int]) -> bool:
        """One round of one member; False once it has ended."""
        crew = self.crews[member]
        this = crew.next_round()
        handlers = {
            "expand": self.process.expand,
            "rollout": self.process.rollout,
            "share": self.store.exchange,
        }
        replies = dispatch(this.requests, handlers)
        for ended in crew.resume(this.members, this.by_member(replies), 0.0):
            if isinstance(ended.outcome, SdtError):
                raise ended.outcome
            self.results.append(ended.outcome)
            del self.crews[member]
            return False
        return True

    def finish(self, rng: np.random.Generator) -> list[SearchResult]:
        """Step random members until all have ended."""
        while self.crews:
            members = list(self.crews)
            self.step(members[rng.integers(len(members))])
        return self.results


class UnreliableStore:
    """Loses, repeats and delays updates, loses answers, and restarts empty, each with some probability."""

    def __init__(self, rng: np.random.Generator, probability: float = 0.2) -> None:
        self.store = EvidenceStore()
        self._rng = rng
        self._probability = probability
        self._late: list[ShareRequest] = []

    def _happens(self) -> bool:
        return self._rng.random() < self._probability

    def exchange(self, requests: Sequence[ShareRequest]) -> list[Shared]:
        return list(self._answers(requests))

    def _answers(self, requests: Sequence[ShareRequest]) -> Iterator[Shared]:
        for request in requests:
            self._late.append(request)
            if self._happens():
                self.store = EvidenceStore()
            if self._happens():  # something old arrives, once more or late
                late = self._late[self._rng.integers(len(self._late))]
                self.store.add(late.key, reversed(late.publish), late.closed)
            if self._happens():  # the request is lost, and so is its answer
                yield Shared((), {}, {})
                continue
            (reply,) = self.store.exchange([request])
            yield Shared((), {}, {}) if self._happens() else reply
