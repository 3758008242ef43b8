"""`mcts`: Monte Carlo tree search with PUCT or UCT selection and mean backup (Silver et al. 2017; Kocsis 2006)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdt_dist.search.driver import Search
from sdt_dist.search.loop import grow
from sdt_dist.search.methods import Method
from sdt_dist.search.methods.maxent_ts import SELECTION, EnumeratingRule
from sdt_dist.search.options import ValueTreeOptions
from sdt_dist.search.session import Session
from sdt_dist.search.walks import greedy_result


class MctsOptions(ValueTreeOptions):
    """Options of mcts."""

    expansion_k: int = Field(8, ge=1, description="tokens enumerated at a node")
    selection: Literal["puct", "uct"] = Field(
        "puct", description="upper bound that chooses among children"
    )
    c_puct: float = Field(1.25, ge=0, description="exploration constant of the bound")


def run(session: Session) -> Search:
    """Samples are the most visited walk, then the best by reward."""
    options = session.options
    assert isinstance(options, MctsOptions)
    selection = SELECTION[options.selection]
    tree = session.start_tree()
    rule = EnumeratingRule(options, options.expansion_k, selection, options.c_puct, soft=False)
    yield from grow(session, tree, rule, options.rollout_max_new_tokens)
    return greedy_result(session, tree, "mcts", "visits", rule.is_exhausted(tree))


METHODS = {"mcts": Method("mcts", MctsOptions, run, ignores=("inverse_temperature",))}
