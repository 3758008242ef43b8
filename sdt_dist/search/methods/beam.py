"""`beam`: beam search by log p (the sequences that are likely, whatever their reward)."""

from __future__ import annotations

from pydantic import Field

from sdt_dist.protocols import ExpandRequest, Expansion, FinishReason
from sdt_dist.search.driver import Search
from sdt_dist.search.methods import Method
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.session import Session

Beam = tuple[float, tuple[int, ...]]  # log p, tokens


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


def _children(beam: Beam, reply: Expansion) -> list[Beam]:
    """The beam with one more token, for each child."""
    log_prob, tokens = beam
    steps = zip(reply.children.tolist(), reply.log_prob.tolist(), strict=True)
    return [(log_prob + step, (*tokens, token)) for token, step in steps]


def _best(beams: list[Beam], width: int) -> list[Beam]:
    """The most probable, of equals those with the lower tokens."""
    return sorted(beams, key=lambda beam: (-beam[0], beam[1]))[:width]


def run(session: Session) -> Search:
    """Keep the `beam_width` most probable prefixes; finished beams leave their place in the final ranking."""
    options = session.options
    assert isinstance(options, BeamOptions)
    width = _width(session, options)
    beams: list[Beam] = [(0.0, ())]
    finished: list[Beam] = []
    while beams:
        requests = [ExpandRequest(session.root, tokens, width) for _, tokens in beams]
        replies = yield from session.ask(requests)
        grown: list[Beam] = []
        for beam, reply in zip(beams, replies, strict=True):
            assert isinstance(reply, Expansion)
            grown += _children(beam, reply)
        kept = _best(grown, width)
        beams = []
        for beam in kept:
            place = finished if session.states.is_finished(beam[1]) else beams
            place.append(beam)
        finished = _best(finished, width)
        if len(finished) == width and beams and beams[0][0] <= finished[-1][0]:
            break
    log_probs = [log_prob for log_prob, _ in finished]
    sequences = [tokens for _, tokens in finished]
    reasons: list[FinishReason] = [session.states.finish_reason(tokens) for tokens in sequences]
    indices = yield from session.score(sequences, log_probs, reasons)
    session.budget.rollouts += len(finished)
    return session.result("beam", indices[: options.num_samples])


METHODS = {"beam": Method("beam", BeamOptions, run, ignores=("reward", "inverse_temperature"))}
