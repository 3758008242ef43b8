"""`s_adt`: residual_ts that uses a learned flow F(s), the amortised soft value, and stays exact.

See docs/concepts/target.md#methods, docs/concepts/flow.md.

Each use of F is a switch. `proposal`: walks by mass arms draw their tokens from q(a|s) ~ p(a|s) exp(lambda F(s a)), with
path weights p/q. `alpha`: mass arms mix F into the tree's own estimates (see `mass`), with a share that decays in the
walks through a node. With these log Z is unbiased whatever F is; a good F needs fewer rollouts, a bad one more.

A constant share (alpha_decay=None) leaves log Z unbiased too, and weights stay within 1/epsilon, because samples follow path
weights and not the mixed values. Its cost is variance that does not go away: on toy B, alpha = 1 without the proposal, an F
of the wrong sign had a total variation of 0.77, 0.55, 0.24, 0.07 after 100, 300, 1000, 2500 walks, where the decaying share
had 0.67, 0.28, 0.057, 0.011 and residual_ts 0.58, 0.24, 0.056, 0.011. Beside the proposal an exact F gains nothing from a
decaying share, and loses half as much again by a constant one, which cannot see what was visited but for its prior mass.

`leaf_values`: a walk draws one token and takes exp(lambda F) for its new node's estimate, without a rollout: at most one
row of the model a walk. Here F's own scale matters, not only how it compares siblings, and the answer is as good as F
until walks have finished samples everywhere: log Z and ESS are not claimed unless the tree is exhausted. Samples come from
the final falls, which go on from q below the tree whatever `proposal` says, and whose rows the budget does not cover.

It must not know what F is made of.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from sdt_dist.search.driver import Search
from sdt_dist.search.methods import Method
from sdt_dist.search.methods.residual_ts import FlowUses, ResidualOptions, sample_tree
from sdt_dist.search.session import Session


class FlowOptions(ResidualOptions):
    """Options of s_adt: those of residual_ts, and a switch for each use of the flow."""

    proposal: bool = Field(
        True, description="whether walks and rollouts draw from the flow's proposal q instead of p"
    )
    alpha: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the flow's F in the arms of mass walks at a node without visits; 0: none",
    )
    alpha_decay: float | None = Field(
        10.0,
        gt=0,
        description="n0 of the share alpha n0 / (n0 + N(s)), N(s) walks through the node; None: constant alpha",
    )
    leaf_values: bool = Field(
        False,
        description="whether a walk ends after one token, its node's estimate being exp(lambda F); needs draw='fall'",
    )

    @model_validator(mode="after")
    def _leaves_have_no_weights(self) -> FlowOptions:
        if self.leaf_values and self.draw != "fall":
            raise ValueError(
                f"leaf_values=True with draw={self.draw!r}, allowed: draw='fall', because walks that end without a rollout "
                "have no path weights to resample by"
            )
        return self

    @property
    def flow_uses(self) -> FlowUses:
        decay = 0.0 if self.alpha_decay is None else 1.0 / self.alpha_decay
        return FlowUses(self.proposal, self.alpha, decay, self.leaf_values)


def run(session: Session) -> Search:
    """Search one problem; without any use of the flow it is residual_ts."""
    options = session.options
    assert isinstance(options, FlowOptions)
    if not options.flow_uses.any:
        session.flow = None
    return (yield from sample_tree(session, "s_adt"))


METHODS = {"s_adt": Method("s_adt", FlowOptions, run, flow="required")}
