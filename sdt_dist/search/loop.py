"""The one tree-search loop: select a wave of walks, ask the model, attach, score, back up (SPEC sections 1.1, 1.2).

A `TreeRule` holds everything in which tree methods differ. A wave's walks are all selected before any is backed
up, and each walk's randomness is keyed by its ticket number, so waves and companions never change a draw.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdt_dist.noise import position_key
from sdt_dist.protocols import ExpandRequest, Expansion, Rollout, RolloutRequest
from sdt_dist.search.kernels import count_visits, path_log_prior
from sdt_dist.search.options import TreeOptions
from sdt_dist.search.session import Reply, Request, Session
from sdt_dist.search.tree import Tree


@dataclass(slots=True)
class Walk:
    """One walk under way. `ticket` numbers walks from 0; `node` is where it stands."""

    ticket: int
    arm_key: np.uint64
    draw_stream: int
    node: int = 0
    log_omega: float = 0.0
    sample: int = -1


_Waiting = tuple[Walk, ExpandRequest | RolloutRequest]


class TreeRule(Protocol):
    """Selection, expansion, leaf evaluation and backup of one method."""

    @property
    def options(self) -> TreeOptions: ...

    def advance(self, session: Session, tree: Tree, walk: Walk) -> ExpandRequest | RolloutRequest | None:
        """Move the walk down until it needs the model (its request) or stands on a terminal node (None)."""
        ...

    def backup(self, tree: Tree, leaf: int) -> None:
        """Update the estimates between a terminal node that has just got its reward and the root."""
        ...

    def is_exhausted(self, tree: Tree) -> bool:
        """Whether nothing is left to explore."""
        ...

    def record(self, tree: Tree, walks: list[Walk]) -> None:
        """Called once a wave, after its walks were scored and before any is backed up."""
        ...


def grow(session: Session, tree: Tree, rule: TreeRule) -> Generator[list[Request], list[Reply], None]:
    """Run waves until the budget is spent or the tree is exhausted."""
    ticket = session.rollouts
    while not rule.is_exhausted(tree) and (count := session.next_wave(rule.options.wave_size)):
        walks = [_start(session, ticket + i) for i in range(count)]
        ticket += count
        tree.nodes["visits"][0] += count
        yield from _descend(session, tree, rule, walks)
        leaves = [walk.node for walk in walks]
        indices = yield from session.score(
            [tree.tokens(leaf) for leaf in leaves],
            [path_log_prior(tree.nodes, leaf) for leaf in leaves],
            [session.process.finish_reason(tree.tokens(leaf)) for leaf in leaves],
        )
        session.rollouts += count
        for walk, index in zip(walks, indices, strict=True):
            walk.sample = index
        rule.record(tree, walks)
        for walk in walks:
            reward = session.finished[walk.sample].reward
            tree.set_reward(walk.node, reward, rule.options.inverse_temperature)
        for walk in walks:
            rule.backup(tree, walk.node)


def rollout_request(
    session: Session, tree: Tree, walk: Walk, num_tokens: int | None = None, *, fresh: bool
) -> RolloutRequest:
    """A draw from p below the walk's node, outside its children when `fresh`, to the end or `num_tokens` long."""
    depth = tree.depth(walk.node)
    left = session.process.max_new_tokens - depth
    return RolloutRequest(
        session.root,
        tree.tokens(walk.node),
        left if num_tokens is None else min(num_tokens, left),
        position_key(walk.draw_stream, depth),
        tree.child_tokens(walk.node) if fresh else (),
    )


def _start(session: Session, ticket: int) -> Walk:
    return Walk(ticket, np.uint64(session.key("arms", 0, ticket)), session.key("p", 0, ticket))


def _descend(
    session: Session, tree: Tree, rule: TreeRule, walks: list[Walk]
) -> Generator[list[Request], list[Reply], None]:
    active: list[Walk] = walks
    held: list[_Waiting] = []
    while active or held:
        asked = [(walk, rule.advance(session, tree, walk)) for walk in active]
        waiting = [(walk, request) for walk, request in asked if request is not None]
        ready = [pair for pair in waiting if not _runs_to_the_end(session, tree, *pair)]
        held += [pair for pair in waiting if _runs_to_the_end(session, tree, *pair)]
        if not ready:
            ready, held = held, []
        if not ready:
            return
        replies = yield from session.ask([request for _, request in ready])
        for (walk, request), reply in zip(ready, replies, strict=True):
            _absorb(session, tree, walk, request, reply)
        active = [walk for walk, _ in ready if not tree.is_terminal(walk.node)]


def _runs_to_the_end(session: Session, tree: Tree, walk: Walk, request: ExpandRequest | RolloutRequest) -> bool:
    """Long rollouts wait for the wave's short requests, so that the whole wave decodes in one batch."""
    if isinstance(request, ExpandRequest):
        return False
    return tree.depth(walk.node) + request.num_tokens >= session.process.max_new_tokens


def _absorb(session: Session, tree: Tree, walk: Walk, request: ExpandRequest | RolloutRequest, reply: Reply) -> None:
    """Join a reply to the tree; a rollout moves its walk to the last state that it generated."""
    if isinstance(reply, Expansion):
        tree.attach_expansion(walk.node, reply, request.excluded, session.process.is_finished)
        return
    assert isinstance(reply, Rollout)
    start = walk.node
    complete = reply.finish_reason == "eos" or tree.depth(start) + len(reply.tokens) == session.process.max_new_tokens
    walk.node = tree.attach_rollout(start, reply, finished=complete)
    count_visits(tree.nodes, walk.node, start)
