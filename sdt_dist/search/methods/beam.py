"""`beam`: beam search by log p (the sequences that are likely, whatever their reward)."""

from __future__ import annotations

from pydantic import Field

from sdt_dist.protocols import ExpandRequest, Expansion
from sdt_dist.search.driver import Search
from sdt_dist.search.methods import Method
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.session import Session


class BeamOptions(SearchOptions):
    """Options of beam."""

    beam_width: int | None = Field(
        None, ge=1, description="beams kept; default: what the budget pays for"
    )


def _width(session: Session, options: BeamOptions) -> int:
    if options.beam_width is not None:
        return options.beam_width
    if options.max_nfe is not None:
        return max(1, (options.max_nfe - 1) // max(session.states.max_new_tokens - 1, 1))
    return options.num_rollouts or options.num_samples


def run(session: Session) -> Search:
    """Keep the `beam_width` most probable prefixes; finished beams leave their place in the final ranking."""
    options = session.options
    assert isinstance(options, BeamOptions)
    width = _width(session, options)
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    while beams:
        requests = [ExpandRequest(session.root, tokens, width) for _, tokens in beams]
        replies = yield from session.ask(requests)
        grown = [
            (log_prob + step, (*tokens, token))
            for (log_prob, tokens), reply in zip(beams, replies, strict=True)
            if isinstance(reply, Expansion)
            for token, step in zip(reply.children.tolist(), reply.log_prob.tolist(), strict=True)
        ]
        kept = sorted(grown, key=lambda beam: (-beam[0], beam[1]))[:width]
        finished += [beam for beam in kept if session.states.is_finished(beam[1])]
        finished = sorted(finished, key=lambda beam: (-beam[0], beam[1]))[:width]
        beams = [beam for beam in kept if not session.states.is_finished(beam[1])]
        if len(finished) == width and beams and beams[0][0] <= finished[-1][0]:
            break
    indices = yield from session.score(
        [tokens for _, tokens in finished],
        [log_prob for log_prob, _ in finished],
        [session.states.finish_reason(tokens) for _, tokens in finished],
    )
    session.budget.rollouts += len(finished)
    return session.result("beam", indices[: options.num_samples])


METHODS = {"beam": Method("beam", BeamOptions, run, ignores=("reward", "inverse_temperature"))}
