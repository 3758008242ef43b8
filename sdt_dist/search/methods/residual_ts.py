"""`residual_ts`: residual-mass tree sampling, unbiased and without replacement.

See docs/concepts/exactness.md.

Waves: every walk of a wave is selected on the tree as it stood when the wave began, so S_i is that tree's set of
finished sequences and q_i its law; two walks of one wave may find the same sequence, which is then known once
and keeps both path weights. E[t_i] = Z holds for each walk whatever the others of its wave drew.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from pydantic import Field

from sdt_dist.errors import ConfigurationError
from sdt_dist.protocols import Rollout, RolloutRequest
from sdt_dist.search.driver import Search
from sdt_dist.search.loop import Walk, grow, rollout_request
from sdt_dist.search.methods import Method
from sdt_dist.search.options import TreeOptions
from sdt_dist.search.session import Reply, Request, Session
from sdt_dist.search.sharing import Member
from sdt_dist.tree.kernels import count_visits, path_log_prior, path_log_ratio
from sdt_dist.tree.mass import backup_mass, fall_mass, walk_mass
from sdt_dist.tree.resample import effective_sample_size, log_sum, normalise, systematic
from sdt_dist.tree.tree import Tree
from sdt_dist.values.estimate import Estimate, exact
from sdt_dist.values.extract import notes_of
from sdt_dist.values.records import Membership


@dataclass(frozen=True, slots=True)
class FlowUses:
    """What a search does with its session's flow (see `s_adt`): F's share in mass arms is alpha / (1 + decay N(s))."""

    proposal: bool = False
    alpha: float = 0.0
    decay: float = 0.0
    leaf_values: bool = False

    @property
    def any(self) -> bool:
        return self.proposal or self.alpha > 0 or self.leaf_values


class ResidualOptions(TreeOptions):
    """Options of residual_ts; it has no widening constants, block_size or branch_depths."""

    epsilon: float = Field(
        0.25, gt=0, le=1, description="probability that a whole walk uses prior arms"
    )
    draw: Literal["path", "fall"] = Field(
        "path", description="final draw: resample by W, or walk the tree by mass"
    )

    @property
    def flow_uses(self) -> FlowUses:
        return FlowUses()


@dataclass(frozen=True, slots=True)
class Ticket:
    """What one walk contributes: log K(root) of the tree it saw, log omega, what it found, its wave's end."""

    log_known: float
    log_omega: float
    sample: int
    wave_end: int


class MassRule:
    """Walk by mass or prior arms to a residual arm, draw a new token there, roll out; back up masses.

    Draws are from p; where the session's flow is used as a proposal, a walk by mass arms draws from its q. With leaf values
    a walk draws one token and takes F of the state it reached for its estimate.
    """

    def __init__(self, options: ResidualOptions, tickets: list[Ticket]) -> None:
        self.options = options
        self.tickets = tickets
        self._uses = options.flow_uses

    def advance(self, session: Session, tree: Tree, walk: Walk) -> RolloutRequest:
        is_prior_walk = self._move(tree, walk, session.budget.rollouts)
        if self._uses.leaf_values:
            walk.limit = 1
        tilt = session.tilt("q" if self._uses.proposal and not is_prior_walk else "p")
        return rollout_request(session, tree, walk, fresh=True, tilt=tilt)

    def select(self, tree: Tree, walk: Walk) -> None:
        """Move a walk that draws from p to the node of a residual arm and note its path weight."""
        self._move(tree, walk, 0)
        self._weigh(walk, 0.0)

    def _move(self, tree: Tree, walk: Walk, num_walks: int) -> bool:
        """Move a walk of a wave that `num_walks` walks came before; whether it is by prior arms."""
        epsilon = self.options.epsilon
        uses = self._uses
        walk.node, walk.log_am, walk.log_ap, is_prior_walk = walk_mass(
            tree.nodes, walk.arm_key, epsilon, uses.alpha, uses.decay, num_walks
        )
        walk.origin = walk.node
        return is_prior_walk

    def _weigh(self, walk: Walk, log_ratio: float) -> None:
        """omega = p/q of a walk (see `mass`); log_ratio is the log of q/p of the tokens that it drew."""
        epsilon = self.options.epsilon
        log_mixed = np.log(epsilon) + walk.log_ap
        if epsilon < 1:
            log_mixed = np.logaddexp(log_mixed, np.log1p(-epsilon) + walk.log_am + log_ratio)
        walk.log_omega = -float(log_mixed)

    def attach(self, tree: Tree, start: int, rollout: Rollout, finished: bool) -> int:
        leaf = tree.attach_rollout(start, rollout, finished, "q" if self._uses.proposal else "p")
        if self._uses.leaf_values and not finished:
            assert rollout.log_tilt is not None
            tree.set_estimate(leaf, float(rollout.log_tilt[-1]))
        return leaf

    def record(self, tree: Tree, walks: list[Walk]) -> None:
        for walk in walks:
            count_visits(tree.nodes, walk.origin, 0)
        if self._uses.leaf_values:
            return
        for walk in walks:
            self._weigh(walk, path_log_ratio(tree.nodes, walk.node, walk.origin))
        log_known = float(tree.nodes["log_known"][0])
        wave_end = len(self.tickets) + len(walks)
        self.tickets += [Ticket(log_known, walk.log_omega, walk.sample, wave_end) for walk in walks]

    def backup(self, tree: Tree, leaf: int) -> None:
        backup_mass(tree.nodes, leaf)

    def is_exhausted(self, tree: Tree) -> bool:
        return bool(tree.nodes["log_open"][0] == -np.inf)


def estimate(tickets: list[Ticket], log_priors: np.ndarray, log_tilts: np.ndarray) -> Estimate:
    """The estimate of docs/concepts/exactness.md from all tickets, in order; log_priors and log_tilts = lambda r are [S].

    t_i = K_i(root) + omega_i E(x_i) and c_i = 2i / (N(N+1)). Given what its walk knew, each t_i has mean Z,
    so deviations of different tickets are uncorrelated and Var(Z-hat) = sum_i c_i^2 Var(t_i).
    """
    count = len(tickets)
    found = np.array([t.sample for t in tickets])
    log_omega = np.array([t.log_omega for t in tickets])
    log_c = np.log(2.0 * np.arange(1, count + 1)) - np.log(count * (count + 1.0))
    log_new = log_omega + log_tilts[found]
    log_t = np.logaddexp([t.log_known for t in tickets], log_new)
    log_z = log_sum(log_c + log_t)
    deviation = np.exp(log_c) * np.expm1(log_t - log_z)
    known_from = np.full(len(log_priors), count)
    np.minimum.at(known_from, found, [t.wave_end for t in tickets])
    tail = np.append(np.cumsum(np.exp(log_c)[::-1])[::-1], 0.0)
    with np.errstate(divide="ignore"):
        log_weights = log_priors + log_tilts + np.log(tail[known_from])
    np.logaddexp.at(log_weights, found, log_c + log_new)
    return Estimate(log_z, float(np.sqrt(np.sum(deviation**2))), log_weights)


def run(session: Session) -> Search:
    """Search one problem; see the module's description. A session with a membership is one of a team's searches."""
    if session.membership is None:
        return (yield from sample_tree(session, "residual_ts"))
    options = session.options
    assert isinstance(options, ResidualOptions)
    return (yield from _run_member(session, options, session.membership))


def sample_tree(session: Session, method: str) -> Search:
    """One search on its own, which `method` reports; it uses the session's flow as its options say.

    Leaf values give no unbiased estimate: then nothing is claimed of Z unless the tree is exhausted, and exact.
    """
    options = session.options
    assert isinstance(options, ResidualOptions)
    notes = session.resumed.notes if session.resumed is not None else None
    tree = session.start_tree()
    rule = MassRule(options, [] if notes is None else _read_tickets(notes))
    yield from grow(session, tree, rule)
    exhausted = rule.is_exhausted(tree)
    log_priors = np.array([sample.log_prob for sample in session.finished])
    log_tilts = options.inverse_temperature * np.array(
        [sample.reward for sample in session.finished]
    )
    outcome = exact(log_priors, log_tilts) if exhausted else None
    if outcome is None and not options.flow_uses.leaf_values:
        outcome = estimate(rule.tickets, log_priors, log_tilts)
    return (
        yield from _answer(
            session,
            method,
            tree,
            outcome,
            options.draw,
            exhausted=exhausted,
            log_z_unbiased=outcome is not None
            and (exhausted or _count_was_fixed(session, len(rule.tickets))),
            notes={
                f.name: np.array([getattr(t, f.name) for t in rule.tickets]) for f in fields(Ticket)
            },
        )
    )


def _run_member(session: Session, options: ResidualOptions, membership: Membership) -> Search:
    """Search a problem as one of a team, or from earlier evidence (see `search.sharing`)."""
    member = Member(session, membership, MassRule(options, []).select)
    yield from member.grow()
    (outcome, catalogue), team = member.estimate(), member.report()
    session.adopt(
        catalogue.sequences, catalogue.log_priors, [walk.components for walk in catalogue.walks]
    )
    exhausted = member.evidence.is_exhausted
    evidence = member.evidence
    facts: dict[str, Any] = {
        "exhausted": exhausted,
        "log_z_unbiased": exhausted or member.is_fixed(),
        "team": team,
    }
    if team.missing:  # another member's answer will be used: no model calls, no tree to send
        return (yield from _answer(session, "residual_ts", None, outcome, "path", **facts))
    notes = notes_of(evidence.walks)
    return (
        yield from _answer(
            session, "residual_ts", evidence.tree, outcome, options.draw, notes=notes, **facts
        )
    )


def _answer(
    session: Session,
    method: str,
    tree: Tree | None,
    outcome: Estimate | None,
    draw: Literal["path", "fall"],
    **fields: Any,
) -> Search:
    """The result: samples drawn by W (equal to `outcome`'s weights of `finished`), or by falls through the tree."""
    probabilities = None if outcome is None else normalise(outcome.log_weights)
    if draw == "fall" and tree is not None:
        chosen = yield from _fall(session, tree)
    else:
        assert probabilities is not None
        chosen = systematic(
            probabilities, session.options.num_samples, session.rng("resample")
        ).tolist()
    if outcome is not None:
        fields |= {"log_z": outcome.log_z, "log_z_error": outcome.log_z_error}
        fields["ess"] = effective_sample_size(outcome.log_weights)
    return session.result(
        method, chosen, tree=tree, probabilities=probabilities if draw == "path" else None, **fields
    )


def _read_tickets(notes: dict[str, np.ndarray]) -> list[Ticket]:
    if not notes.keys() >= {f.name for f in fields(Ticket)}:
        raise ConfigurationError(
            "resume: the saved search was made by a team of searchers, or from earlier evidence; start a new search with "
            "its evidence (warm start) instead."
        )
    columns = [notes[f.name].tolist() for f in fields(Ticket)]
    return [Ticket(*row) for row in zip(*columns, strict=True)]


def _count_was_fixed(session: Session, count: int) -> bool:
    """Whether N was fixed in advance, without which Z-hat is consistent only (docs/concepts/exactness.md)."""
    options = session.options
    nfe_cannot_bind = (
        options.max_nfe is None or options.max_nfe >= count * session.states.max_new_tokens
    )
    return count == options.rollout_limit and options.time_budget_s is None and nfe_cannot_bind


def _fall(session: Session, tree: Tree) -> Generator[list[Request], list[Reply], list[int]]:
    """draw="fall": walk by child p_c M_c and residual (1 - Q_E) R, then go on from q; new sequences are scored.

    Where the flow is neither proposal nor leaf value, q is p.
    """
    options = session.options
    assert isinstance(options, ResidualOptions)
    walks = [
        Walk(i, np.uint64(session.key("fall arms", i)), session.key("fall", i))
        for i in range(session.options.num_samples)
    ]
    for walk in walks:
        walk.node = int(fall_mass(tree.nodes, walk.arm_key))
    open_walks = [walk for walk in walks if not tree.is_terminal(walk.node)]
    is_guided = options.flow_uses.proposal or options.flow_uses.leaf_values
    tilt = session.tilt("q") if is_guided else None
    requests = [rollout_request(session, tree, walk, fresh=True, tilt=tilt) for walk in open_walks]
    replies = yield from session.roll_out(requests)
    ends = {walk.ticket: reply for walk, reply in zip(open_walks, replies, strict=True)}
    sequences = []
    log_probs = []
    reasons = []
    for walk in walks:
        reply = ends.get(walk.ticket)
        tail = reply.tokens.tolist() if reply else []
        sequences.append((*tree.tokens(walk.node), *tail))
        log_probs.append(
            path_log_prior(tree.nodes, walk.node) + (float(reply.log_prob.sum()) if reply else 0.0)
        )
        reasons.append(reply.finish_reason if reply else "length")
    return (yield from session.score(sequences, log_probs, reasons))


METHODS = {"residual_ts": Method("residual_ts", ResidualOptions, run)}
