"""`s_adt`: residual_ts that uses a learned flow F(s), the amortised soft value, and stays exact (SPEC sections 1.2 and 6).

Each use of F is a switch. `proposal`: walks by mass arms draw their tokens from q(a|s) ~ p(a|s) exp(lambda F(s a)), with
path weights p/q, so that log Z is unbiased whatever F is; a good F needs fewer rollouts, a bad one more. It must not know
what F is made of.
"""

from __future__ import annotations

from pydantic import Field

from sdt_dist.search.driver import Search
from sdt_dist.search.methods import Method
from sdt_dist.search.methods.residual_ts import ResidualOptions, sample_tree
from sdt_dist.search.session import Session


class FlowOptions(ResidualOptions):
    """Options of s_adt: those of residual_ts, and a switch for each use of the flow."""

    proposal: bool = Field(True, description="whether walks and rollouts draw from the flow's proposal q instead of p")


def run(session: Session) -> Search:
    """Search one problem; without any use of the flow it is residual_ts."""
    options = session.options
    assert isinstance(options, FlowOptions)
    if not options.proposal:
        session.flow = None
    return (yield from sample_tree(session, "s_adt"))


METHODS = {"s_adt": Method("s_adt", FlowOptions, run, flow="required")}
