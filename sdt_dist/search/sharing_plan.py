"""How the searches of a run share evidence: who is in a problem's team, what it starts from, and one result for all.

docs/concepts/exactness.md#shared-evidence. The in-process driver and a fleet's controller use this alike; it must not know either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sdt_dist.errors import ConfigurationError, SdtError
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.result import SearchCost, SearchResult
from sdt_dist.values.records import Membership
from sdt_dist.values.store import EvidenceStore

SHARING_METHODS = ("residual_ts",)


class MissingWalksError(SdtError, RuntimeError):
    """No member of a team has seen every share: a store lost walks, or a member did not end.

    `searchers` are those to start again, each as a new incarnation, and to merge again.
    """

    def __init__(self, searchers: tuple[int, ...]) -> None:
        super().__init__(
            f"evidence: the shares of searchers {list(searchers)} are not whole in any member's view; start these again "
            "with a new incarnation."
        )
        self.searchers = searchers

    def __reduce__(self) -> tuple[type, tuple[tuple[int, ...]]]:
        return MissingWalksError, (self.searchers,)  # as it is raised, not by its message


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """The sharing of one method's searches in one run.

    run: a name that no other run uses, nor another method's searches in this run. keys: the evidence key
    (`values.keys.evidence_key`) of each problem, by its index. warm: evidence of earlier runs, which stays as it is while the run goes on.
    """

    run: str
    keys: Mapping[int, str]
    searchers_per_problem: int = 1
    warm: EvidenceStore | None = None

    def members(self, problem: int, incarnation: int = 0) -> list[Membership | None]:
        """The team of a problem, one membership a search; [None] where a search on its own has nothing to share."""
        key = self.keys[problem]
        warm = tuple(self.warm.walks(key)) if self.warm is not None else ()
        if self.searchers_per_problem == 1 and not warm:
            return [None]
        team = f"{self.run}/{problem}"
        count = self.searchers_per_problem
        return [
            Membership(key, team, searcher, count, incarnation, warm) for searcher in range(count)
        ]

    def again(self, start: int) -> SharingPlan:
        """The plan of teams that begin again from nothing, under names that their first start did not use."""
        return replace(self, run=f"{self.run}.{start}")


def check_sharing(
    method: str, options: SearchOptions, searchers_per_problem: int, warm: bool
) -> None:
    """Refuse sharing that a method cannot do, or a budget that leaves a searcher nothing; ConfigurationError."""
    if method not in SHARING_METHODS and (searchers_per_problem > 1 or warm):
        setting = (
            f"searchers_per_problem: {searchers_per_problem}"
            if searchers_per_problem > 1
            else "warm_start: given"
        )
        raise ConfigurationError(
            f"{setting}, but method {method!r} cannot read other searches' evidence; allowed: "
            f"{', '.join(SHARING_METHODS)}. Leave the setting out, or run the other methods on their own."
        )
    budgets = {"num_rollouts": options.rollout_limit, "max_nfe": options.max_nfe}
    for name, total in budgets.items():
        if total is not None and total < searchers_per_problem:
            raise ConfigurationError(
                f"searchers_per_problem: {searchers_per_problem}, allowed at most {name} = {total}, so that each searcher "
                f"has something to do; raise {name}."
            )


def merge_members(results: Sequence[SearchResult], model_calls: int | None = None) -> SearchResult:
    """One result for a problem from its members', at the cost of all: that of the member that saw most.

    results: what every incarnation that ended returned, in any order. model_calls: forward passes of the whole team,
    where members shared some; default the sum. What a crashed incarnation paid for walks that were seen is added.
    MissingWalksError when no member saw every share.
    """
    whole = [result for result in results if result.complete]
    if not whole:
        parts = [result.team for result in results if result.team is not None]
        raise MissingWalksError(min((part.missing for part in parts), key=len))
    best = max(whole, key=lambda result: len(result.finished))
    cost = _total(results, best)
    if model_calls is not None:
        cost = replace(cost, model_calls=model_calls)
    return replace(best, cost=cost, tree_stats=best.tree_stats | {"rollouts": float(cost.rollouts)})


def _total(results: Sequence[SearchResult], best: SearchResult) -> SearchCost:
    """The members' bills and, of incarnations that returned none, what their walks in the best view cost."""
    ended = {result.team.stream for result in results if result.team is not None}
    paid = best.team.paid if best.team is not None else {}
    lost = [amount for stream, amount in paid.items() if stream not in ended]
    walks = sum(n for n, _ in lost)
    nfe = sum(n for _, n in lost)
    costs = [result.cost for result in results]
    return SearchCost(
        nfe=sum(cost.nfe for cost in costs) + nfe,
        model_calls=sum(cost.model_calls for cost in costs),
        rollouts=sum(cost.rollouts for cost in costs) + walks,
        reward_calls=sum(cost.reward_calls for cost in costs) + walks,
        recomputed_tokens=sum(cost.recomputed_tokens for cost in costs),
        wall_s=sum(cost.wall_s for cost in costs),
    )
