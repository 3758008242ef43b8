"""`smc`: particle filtering towards pi* with a reward's partial form as potential (twisted SMC, arXiv 2404.17546).

Particles grow by segments from p; at each segment's end log-weights take lambda times the change of the partial
reward, at the end the remainder up to lambda r(x), so that the final weights are exact whatever the potential.
Without a partial form the potential is 0 on the way and the method is snis with particles. With a flow particles grow from
its proposal q, their weights take p/q of what they drew, and lambda F(s) is the potential (docs/concepts/flow.md#proposal).
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from pydantic import Field

from sdt_dist.noise import position_key
from sdt_dist.protocols import FinishReason, RolloutRequest
from sdt_dist.search.driver import Search
from sdt_dist.search.methods import Method
from sdt_dist.search.methods.sampling import log_ratio
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.session import Reply, Request, Session
from sdt_dist.tree.resample import effective_sample_size, log_sum, normalise, systematic


class SmcOptions(SearchOptions):
    """Options of smc."""

    ess_threshold: float = Field(
        0.5, ge=0, le=1, description="resample when ESS falls below this share of particles"
    )
    segments: int = Field(
        8, ge=1, description="points at which particles are weighted and perhaps resampled"
    )


class Particles:
    """Prefixes with log p, lambda F of them, the potential already in their weights, and their log-weights [P]."""

    def __init__(self, count: int) -> None:
        self.tokens: list[tuple[int, ...]] = [()] * count
        self.log_prob = np.zeros(count)
        self.log_tilt = np.zeros(count)
        self.potential = np.zeros(count)
        self.log_weight = np.zeros(count)
        self.log_z = 0.0
        self.ancestor = np.arange(count)
        self.num_draws = 1

    def reweight(self, potential: np.ndarray) -> None:
        self.log_weight = self.log_weight + potential - self.potential
        self.potential = potential

    def collect(self) -> None:
        """Move the mean weight into log Z (Del Moral 2004: the product of means is unbiased for Z)."""
        mean = log_sum(self.log_weight) - np.log(len(self.log_weight))
        self.log_z += float(mean)
        self.log_weight = self.log_weight - mean

    def resample(self, rng: np.random.Generator) -> None:
        self.collect()
        chosen = systematic(normalise(self.log_weight), len(self.tokens), rng)
        self.tokens = [self.tokens[i] for i in chosen]
        self.log_prob = self.log_prob[chosen]
        self.log_tilt = self.log_tilt[chosen]
        self.potential = self.potential[chosen]
        self.log_weight = np.zeros(len(chosen))
        self.ancestor = self.ancestor[chosen]
        self.num_draws = self.num_draws + 1

    def relative_error(self) -> float | None:
        """Standard error of Z-hat over Z from the genealogy of the final weights (Lee and Whiteley 2018, eq. 8).

        1 - (N/(N-1))^n (1 - sum over first ancestors of their descendants' weight squared), n the number of draws;
        the usual error of a mean without resampling. It is derived for multinomial resampling: here, where resampling is
        systematic, it can be far too small, and 0 where the expression is negative, so take it for an indication.
        """
        count = len(self.tokens)
        if count < 2:
            return None
        shares = np.bincount(self.ancestor, weights=normalise(self.log_weight), minlength=count)
        return float(
            np.sqrt(
                max(1.0 - (count / (count - 1)) ** self.num_draws * (1.0 - np.sum(shares**2)), 0.0)
            )
        )


def run(session: Session) -> Search:
    """Samples are the final particles, resampled by weight."""
    options = session.options
    assert isinstance(options, SmcOptions)
    length = session.states.max_new_tokens
    particles = Particles(_count(session, options))
    ends = sorted(
        {max(1, round(length * (i + 1) / options.segments)) for i in range(options.segments)}
    )
    for end in ends:
        yield from _extend(session, particles, end)
        has_partial = getattr(session.problem.reward, "has_partial", False)
        if end < length and (session.flow is not None or has_partial):
            particles.reweight((yield from _potential(session, particles)))
            if effective_sample_size(particles.log_weight) < options.ess_threshold * len(
                particles.tokens
            ):
                particles.resample(session.rng(f"particles {end}"))
    reasons: list[FinishReason] = [
        session.states.finish_reason(tokens) for tokens in particles.tokens
    ]
    indices = yield from session.score(particles.tokens, particles.log_prob.tolist(), reasons)
    session.budget.rollouts += len(indices)
    particles.reweight(options.inverse_temperature * session.rewards(indices))
    per_particle = normalise(particles.log_weight)
    ess = effective_sample_size(particles.log_weight)
    relative_error = particles.relative_error()
    particles.collect()
    probabilities = np.bincount(indices, weights=per_particle, minlength=len(session.finished))
    return session.result(
        "smc",
        systematic(probabilities, options.num_samples, session.rng("resample")).tolist(),
        log_z=particles.log_z,
        log_z_error=relative_error,
        log_z_unbiased=True,
        ess=ess,
        probabilities=probabilities,
    )


def _potential(
    session: Session, particles: Particles
) -> Generator[list[Request], list[Reply], np.ndarray]:
    """The log-potential [P] of unfinished particles: lambda F where there is a flow, else lambda times the partial form."""
    if session.flow is not None:
        return particles.log_tilt.copy()
    return session.options.inverse_temperature * (
        yield from session.score_partial(particles.tokens)
    )


def _count(session: Session, options: SmcOptions) -> int:
    """Particles that the budget pays for: every one costs a full rollout."""
    by_rollouts = options.rollout_limit
    if options.max_nfe is None:
        return by_rollouts or 100
    by_nfe = max(1, round((options.max_nfe - 1) / max(session.states.max_new_tokens - 1, 1)))
    return min(by_nfe, by_rollouts or by_nfe)


def _extend(
    session: Session, particles: Particles, end: int
) -> Generator[list[Request], list[Reply], None]:
    """Grow every unfinished particle by draws from p or q to `end` tokens; a slot's stream belongs to the slot."""
    growing = [
        i for i, tokens in enumerate(particles.tokens) if not session.states.is_finished(tokens)
    ]
    requests = [
        RolloutRequest(
            session.root,
            particles.tokens[i],
            end - len(particles.tokens[i]),
            position_key(session.key("draw", i), len(particles.tokens[i])),
            tilt=session.tilt("q"),
        )
        for i in growing
    ]
    replies = yield from session.roll_out(requests)
    for i, reply in zip(growing, replies, strict=True):
        particles.tokens[i] = (*particles.tokens[i], *reply.tokens.tolist())
        particles.log_prob[i] += float(reply.log_prob.sum())
        particles.log_weight[i] += log_ratio(reply)
        if reply.log_tilt is not None:
            particles.log_tilt[i] = reply.log_tilt[-1]


METHODS = {"smc": Method("smc", SmcOptions, run, flow="optional")}
