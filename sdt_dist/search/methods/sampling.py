"""`greedy`, `sample`, `best_of_n` and `snis`: ancestral sampling from p and what is made of its draws.

See docs/concepts/target.md#methods.

Draw i uses the stream (seed, problem, "draw", i), so the first draws of all three sampling methods coincide. With a flow
snis draws from its proposal q instead (docs/concepts/flow.md#proposal).
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from sdt_dist.protocols import Rollout, RolloutRequest, Tilt
from sdt_dist.search.driver import Search
from sdt_dist.search.methods import Method
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.session import Reply, Request, Session
from sdt_dist.tree.resample import effective_sample_size, log_sum, normalise, systematic

_CHUNK = 256  # draws asked for at once; a backend splits them further


def _finish(
    session: Session, rollouts: list[Rollout]
) -> Generator[list[Request], list[Reply], list[int]]:
    """Score finished rollouts from the root; indices into `finished`, one a rollout."""
    indices = yield from session.score(
        [tuple(r.tokens.tolist()) for r in rollouts],
        [float(r.log_prob.sum()) for r in rollouts],
        [r.finish_reason for r in rollouts],
    )
    session.budget.rollouts += len(rollouts)
    return indices


def draw_from_prior(
    session: Session, limit: int | None = None
) -> Generator[list[Request], list[Reply], list[int]]:
    """iid draws from p, `limit` of them or as many as the budget allows; indices into `finished`, one a draw."""
    return (yield from _draw(session, None, limit))[0]


def _draw(
    session: Session, tilt: Tilt | None, limit: int | None = None
) -> Generator[list[Request], list[Reply], tuple[list[int], np.ndarray]]:
    """iid draws from p, or from the law that `tilt` names: indices into `finished`, and log p/q, one a draw."""
    indices: list[int] = []
    log_ratios: list[float] = []
    while count := (limit - len(indices) if limit is not None else session.next_wave(_CHUNK)):
        first = len(indices)
        requests = [
            RolloutRequest(
                session.root,
                (),
                session.states.max_new_tokens,
                session.key("draw", first + i),
                tilt=tilt,
            )
            for i in range(min(count, _CHUNK))
        ]
        rollouts = yield from session.roll_out(requests)
        indices += yield from _finish(session, rollouts)
        log_ratios += [log_ratio(rollout) for rollout in rollouts]
    return indices, np.array(log_ratios)


def log_ratio(rollout: Rollout) -> float:
    """log p/q of a rollout's tokens; 0 without a proposal."""
    return (
        0.0
        if rollout.log_proposal is None
        else float((rollout.log_prob - rollout.log_proposal).sum())
    )


def run_greedy(session: Session) -> Search:
    """The argmax sequence, once."""
    rollouts = yield from session.roll_out(
        [RolloutRequest(session.root, (), session.states.max_new_tokens, None)]
    )
    indices = yield from _finish(session, rollouts)
    return session.result("greedy", indices)


def run_sample(session: Session) -> Search:
    """num_samples draws from p ("base")."""
    indices = yield from draw_from_prior(session, session.options.num_samples)
    counts = np.bincount(indices, minlength=len(session.finished))
    return session.result("sample", indices, ess=float(len(indices) ** 2 / np.sum(counts**2)))


def run_best_of_n(session: Session) -> Search:
    """The num_samples best distinct of N draws from p."""
    yield from draw_from_prior(session)
    ranked = sorted(range(len(session.finished)), key=lambda i: -session.finished[i].reward)
    return session.result("best_of_n", ranked[: session.options.num_samples])


def run_snis(session: Session) -> Search:
    """Self-normalised importance sampling: N draws from p, resampled in proportion to exp(lambda r).

    With a flow the draws are from q and the weights exp(lambda r) p/q, so that Z-hat is unbiased whatever F is.
    """
    options = session.options
    indices, log_ratios = yield from _draw(session, session.tilt("q"))
    log_weights = options.inverse_temperature * session.rewards(indices) + log_ratios
    per_draw = normalise(log_weights)
    probabilities = np.bincount(indices, weights=per_draw, minlength=len(session.finished))
    log_z = float(log_sum(log_weights) - np.log(len(indices)))
    relative = np.exp(log_weights - log_z) - 1.0
    return session.result(
        "snis",
        systematic(probabilities, options.num_samples, session.rng("resample")).tolist(),
        log_z=log_z,
        log_z_error=float(np.sqrt(np.sum(relative**2) / max(len(indices) - 1, 1) / len(indices))),
        log_z_unbiased=options.time_budget_s is None and options.max_nfe is None,
        ess=effective_sample_size(log_weights),
        probabilities=probabilities,
    )


METHODS = {
    "greedy": Method(
        "greedy",
        SearchOptions,
        run_greedy,
        reference=True,
        ignores=("reward", "inverse_temperature"),
    ),
    "sample": Method(
        "sample",
        SearchOptions,
        run_sample,
        reference=True,
        ignores=("reward", "inverse_temperature"),
    ),
    "best_of_n": Method(
        "best_of_n", SearchOptions, run_best_of_n, ignores=("inverse_temperature",)
    ),
    "snis": Method("snis", SearchOptions, run_snis, flow="optional"),
}
