"""The one tree-search loop: select a wave of walks, ask the model, attach, score, back up.

See docs/concepts/exactness.md, docs/concepts/target.md#methods.

A `TreeRule` holds everything in which tree methods differ. A wave's walks are all selected before any is backed
up, and each walk's randomness is keyed by its ticket number, so waves and companions never change a draw.
A walk ends at a finished sample, or where its rollout is cut: that node is worth the reward's partial form. A rule that cuts
walks itself values their nodes when it attaches them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.noise import position_key
from sdt_dist.protocols import ExpandRequest, Expansion, Rollout, RolloutRequest, Tilt
from sdt_dist.search.options import TreeOptions
from sdt_dist.search.session import Reply, Request, Session
from sdt_dist.tree.kernels import count_visits, path_log_prior
from sdt_dist.tree.tree import Tree

TO_THE_END = 2**31 - 1  # more tokens than any rollout generates
IDLE_WALKS = 1000


@dataclass(slots=True)
class Walk:
    """One walk under way. `ticket` numbers walks from 0; `node` is where it stands.

    Its rollout has generated `rolled` of at most `limit` tokens since it left the nodes that were evaluated before. A walk
    that has a path weight omega = p/q left the tree at `origin`, with log a_m and log a_p up to there (see `mass`).
    """

    ticket: int
    arm_key: np.uint64
    draw_stream: int
    node: int = 0
    origin: int = 0
    log_am: float = 0.0
    log_ap: float = 0.0
    log_omega: float = 0.0
    sample: int = -1
    limit: int = TO_THE_END
    rolled: int = 0


_Waiting = tuple[Walk, ExpandRequest | RolloutRequest]


class TreeRule(Protocol):
    """Selection, expansion, leaf evaluation and backup of one method."""

    @property
    def options(self) -> TreeOptions: ...

    def advance(
        self, session: Session, tree: Tree, walk: Walk
    ) -> ExpandRequest | RolloutRequest | None:
        """Move the walk down until it needs the model (its request) or stands on a terminal node (None)."""
        ...

    def attach(self, tree: Tree, start: int, rollout: Rollout, finished: bool) -> int:
        """Join a rollout's states below `start`; returns the node reached, terminal when `finished`."""
        ...

    def backup(self, tree: Tree, leaf: int) -> None:
        """Update the estimates between a node that has just got its value, at a walk's end, and the root."""
        ...

    def is_exhausted(self, tree: Tree) -> bool:
        """Whether nothing is left to explore."""
        ...

    def record(self, tree: Tree, walks: list[Walk]) -> None:
        """Called once a wave, after its walks were scored and before any is backed up."""
        ...


def grow(
    session: Session, tree: Tree, rule: TreeRule, rollout_max_new_tokens: int | None = None
) -> Generator[list[Request], list[Reply], None]:
    """Run waves until the budget is spent or the tree is exhausted; rollouts are cut at `rollout_max_new_tokens`.

    A search with an nfe budget alone also ends after IDLE_WALKS walks in a row that paid nothing: all that they reach is
    cached, and the budget would never be spent. Where cut rollouts have finished no sample by then, one last wave goes to the end, so that a search always returns
    finished samples; it costs one wave more (docs/concepts/exactness.md#cost). ConfigurationError for a reward without a partial form.
    """
    limit = _limit(session, rollout_max_new_tokens)
    idle = 0
    while not rule.is_exhausted(tree) and (count := session.next_wave(rule.options.wave_size)):
        paid = session.budget.nfe
        yield from _run_wave(session, tree, rule, count, limit)
        idle = 0 if session.budget.nfe > paid else idle + count
        if (
            idle >= IDLE_WALKS
            and session.options.rollout_limit is None
            and session.options.time_budget_s is None
        ):
            break
    if limit < TO_THE_END and not session.finished:
        count = min(rule.options.wave_size, session.options.rollout_limit or TO_THE_END)
        yield from _run_wave(session, tree, rule, count, TO_THE_END)


def _limit(session: Session, rollout_max_new_tokens: int | None) -> int:
    """Most tokens of a rollout; only a reward with a partial form can value a cut one."""
    if rollout_max_new_tokens is None:
        return TO_THE_END
    reward = session.problem.reward
    if not getattr(reward, "has_partial", False):
        name = getattr(reward, "label", type(reward).__name__)
        raise ConfigurationError(
            f"rollout_max_new_tokens: {rollout_max_new_tokens}, but reward {name} has no partial form to value a cut "
            "rollout by; allowed: None (rollouts to the end), or a reward with a partial form."
        )
    return rollout_max_new_tokens


def _run_wave(
    session: Session, tree: Tree, rule: TreeRule, count: int, limit: int
) -> Generator[list[Request], list[Reply], None]:
    """One wave: all its walks are selected and evaluated before the first is backed up."""
    walks = [_start(session, session.budget.rollouts + i, limit) for i in range(count)]
    tree.nodes["visits"][0] += count
    yield from _descend(session, tree, rule, walks)
    finished = [walk for walk in walks if tree.is_terminal(walk.node)]
    yield from _score(session, tree, finished)
    if limit < TO_THE_END:
        yield from _estimate(
            session, tree, {walk.node for walk in walks if not tree.is_terminal(walk.node)}
        )
    session.budget.rollouts += count
    rule.record(tree, walks)
    for walk in finished:
        tree.set_reward(
            walk.node, session.finished[walk.sample].reward, rule.options.inverse_temperature
        )
    for walk in walks:
        rule.backup(tree, walk.node)


def _score(
    session: Session, tree: Tree, walks: list[Walk]
) -> Generator[list[Request], list[Reply], None]:
    """Score the finished samples that walks found."""
    leaves = [walk.node for walk in walks]
    indices = yield from session.score(
        [tree.tokens(leaf) for leaf in leaves],
        [path_log_prior(tree.nodes, leaf) for leaf in leaves],
        [session.states.finish_reason(tree.tokens(leaf)) for leaf in leaves],
    )
    for walk, index in zip(walks, indices, strict=True):
        walk.sample = index


def _estimate(
    session: Session, tree: Tree, nodes: set[int]
) -> Generator[list[Request], list[Reply], None]:
    """Value nodes at which rollouts were cut by the reward's partial form, one length at a time: series stack."""
    by_depth = sorted(nodes, key=lambda node: (tree.depth(node), node))
    for _, group in groupby(by_depth, key=tree.depth):
        same = list(group)
        tree.nodes["value"][same] = yield from session.score_partial(
            [tree.tokens(node) for node in same]
        )


def rollout_request(
    session: Session,
    tree: Tree,
    walk: Walk,
    num_tokens: int | None = None,
    *,
    fresh: bool,
    tilt: Tilt | None = None,
) -> RolloutRequest:
    """A draw below the walk's node, outside its children when `fresh`, `num_tokens` long or to its limit.

    It is from p, or from the law that `tilt` names.
    """
    depth = tree.depth(walk.node)
    left = min(session.states.max_new_tokens - depth, walk.limit - walk.rolled)
    return RolloutRequest(
        session.root,
        tree.tokens(walk.node),
        left if num_tokens is None else min(num_tokens, left),
        position_key(walk.draw_stream, depth),
        tree.child_tokens(walk.node) if fresh else (),
        tilt,
    )


def _start(session: Session, ticket: int, limit: int) -> Walk:
    return Walk(
        ticket, np.uint64(session.key("arms", 0, ticket)), session.key("p", 0, ticket), limit=limit
    )


def _descend(
    session: Session, tree: Tree, rule: TreeRule, walks: list[Walk]
) -> Generator[list[Request], list[Reply], None]:
    active: list[Walk] = walks
    held: list[_Waiting] = []
    while active or held:
        asked = [(walk, rule.advance(session, tree, walk)) for walk in active]
        waiting = [(walk, request) for walk, request in asked if request is not None]
        ready = [pair for pair in waiting if not _is_long(session, tree, *pair)]
        held += [pair for pair in waiting if _is_long(session, tree, *pair)]
        if not ready:
            ready = held
            held = []
        if not ready:
            return
        replies = yield from session.ask([request for _, request in ready])
        for (walk, request), reply in zip(ready, replies, strict=True):
            _absorb(session, tree, rule, walk, request, reply)
        active = [
            walk
            for walk, _ in ready
            if not tree.is_terminal(walk.node) and walk.rolled < walk.limit
        ]


def _is_long(
    session: Session, tree: Tree, walk: Walk, request: ExpandRequest | RolloutRequest
) -> bool:
    """Long rollouts wait for the wave's short requests, so that the whole wave decodes in one batch."""
    if isinstance(request, ExpandRequest):
        return False
    return request.num_tokens > 1 or tree.depth(walk.node) + 1 >= session.states.max_new_tokens


def _absorb(
    session: Session,
    tree: Tree,
    rule: TreeRule,
    walk: Walk,
    request: ExpandRequest | RolloutRequest,
    reply: Reply,
) -> None:
    """Join a reply to the tree; a rollout moves its walk to the last state that it generated.

    A walk that is cut on an evaluated node (an iid draw repeats children) has found nothing, and goes on from there.
    """
    if isinstance(reply, Expansion):
        tree.attach_expansion(walk.node, reply, request.excluded, session.states.is_finished)
        return
    assert isinstance(reply, Rollout)
    start = walk.node
    complete = (
        reply.finish_reason == "eos"
        or tree.depth(start) + len(reply.tokens) == session.states.max_new_tokens
    )
    walk.node = rule.attach(tree, start, reply, complete)
    count_visits(tree.nodes, walk.node, start)
    walk.rolled = walk.rolled + len(reply.tokens) if np.isnan(tree.nodes["value"][walk.node]) else 0
