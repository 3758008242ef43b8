"""The unit that a fleet hands out: one search of one problem, with everything that a searcher needs to make it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from sdt_dist.parts import Context
from sdt_dist.rewards.base import Reward
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import parse_reward
from sdt_dist.search.result import SearchResult
from sdt_dist.values.records import Membership

LATEST = "latest"


class RewardRecipe(Protocol):
    """Makes the reward of one problem, on the machine where the problem is searched."""

    def build(self, context: RewardContext) -> Reward: ...


@dataclass(frozen=True, slots=True)
class SpecReward:
    """A REWARD SPEC; a user's file that it names travels along as text, as other machines may not have it."""

    spec: str
    source: str | None = None

    @classmethod
    def of(cls, spec: str) -> SpecReward:
        """The recipe of a spec that was parsed on this machine."""
        file, _, _ = spec.rpartition(":")
        return cls(
            spec,
            Path(file).read_text(encoding="utf-8")
            if file.endswith(".py") and Path(file).is_file()
            else None,
        )

    def build(self, context: RewardContext) -> Reward:
        if self.source is None:
            return parse_reward(self.spec).build(context)
        file, _, function = self.spec.rpartition(":")
        with tempfile.TemporaryDirectory(prefix="sdt-reward-") as folder:
            path = Path(folder) / Path(file).name
            path.write_text(self.source, encoding="utf-8")
            return parse_reward(f"{path}:{function}").build(context)


@dataclass(frozen=True, slots=True)
class GivenReward:
    """A reward object as it is."""

    reward: Any

    def build(self, context: RewardContext) -> Reward:
        return self.reward


@dataclass(frozen=True, slots=True)
class Work:
    """One search. `name` is unique within a run; `context` is what is continued, in parts.

    `attempt` counts the times it was started before. `keep_tree` returns the finished search as arrays too. `membership`:
    its place in a team that shares evidence. `flow`: identity of the flow that it proposes with, or LATEST for the newest
    that the fleet has when it begins; `flow_version` is that flow's number, once it has begun. `for_learning`: what it finds
    goes to the trajectory buffer too.
    """

    name: str
    problem: int
    context: Context
    reward: RewardRecipe
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    keep_tree: bool = False
    attempt: int = 0
    membership: Membership | None = None
    flow: str | None = None
    flow_version: int | None = None
    for_learning: bool = False

    @property
    def call_name(self) -> str:
        """The name of this attempt."""
        return f"{self.name}#{self.attempt}"

    @property
    def present_membership(self) -> Membership | None:
        """The membership of this attempt: every attempt is an incarnation of its own."""
        member = self.membership
        return (
            None
            if member is None
            else replace(member, incarnation=member.incarnation + self.attempt)
        )


def lean(result: SearchResult, work: Work) -> SearchResult:
    """The result without its live tree, and without the saved one where nobody asked for it."""
    return replace(result, tree=None, snapshot=result.snapshot if work.keep_tree else None)


Loader = Callable[[], Any]


def load_spec(spec: str) -> Any:
    """The model of a MODEL SPEC, on the machine of the server that will answer for it."""
    from sdt_dist.models.loading import load_model

    return load_model(spec)
