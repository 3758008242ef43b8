"""How a result shows itself: ten lines of text, and a table in notebooks. It must not know how a search is made."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdt_dist.search.result import SearchResult

_LEFT = 'style="text-align: left"'


def text(result: SearchResult) -> str:
    """The rows of a result, one a line, below the name of its method."""
    found = rows(result)
    width = max(map(len, found)) + 2
    return "\n".join(
        [_title(result), *(f"  {name:<{width}}{value}" for name, value in found.items())]
    )


def table(result: SearchResult) -> str:
    """The rows of a result as an HTML table, everything that a model wrote escaped."""
    lines = [
        f'<tr><th scope="row" {_LEFT}>{html.escape(name)}</th><td {_LEFT}>{html.escape(value)}</td></tr>'
        for name, value in rows(result).items()
    ]
    return f"<table><caption {_LEFT}>{html.escape(_title(result))}</caption><tbody>{''.join(lines)}</tbody></table>"


def rows(result: SearchResult) -> dict[str, str]:
    """What there is to say of a result by name; a quantity that its method does not claim has no row."""
    cost = result.cost
    found = {
        "samples": _samples(result),
        "best": str(result.best),
        "log Z": _log_z(result),
        "ESS": "" if result.ess is None else f"{result.ess:.4g}",
        "nfe": f"{cost.nfe:,} next-token distributions in {cost.model_calls:,} model calls",
        "cost": f"{cost.rollouts:,} rollouts, {cost.reward_calls:,} reward calls, {cost.wall_s:.3g} s",
        "tree": _tree(result),
        "flow": result.flow or "",
        "team": _team(result),
    }
    return {name: value for name, value in found.items() if value}


def _title(result: SearchResult) -> str:
    repeats = "" if result.deterministic else ", not repeatable bit for bit"
    return f"SearchResult of {result.method} (seed {result.seed}{repeats})"


def _samples(result: SearchResult) -> str:
    count = f"{len(result.samples):,} ({len(result.finished):,} distinct sequences finished)"
    rewards = [sample.reward for sample in result.samples]
    if not rewards:
        return count
    mean = sum(rewards) / len(rewards)
    return f"{count}, reward {min(rewards):.4g} to {max(rewards):.4g}, mean {mean:.4g}"


def _log_z(result: SearchResult) -> str:
    if result.log_z is None:
        return ""
    error = "" if result.log_z_error is None else f" ± {result.log_z_error:.2g}"
    return f"{result.log_z:.4g}{error}{' (Z unbiased)' if result.log_z_unbiased else ''}"


def _tree(result: SearchResult) -> str:
    stats = result.tree_stats
    if not stats:
        return ""
    depth = f"depth {stats['depth_mean']:.3g} on average, {stats['depth_max']:.0f} at most"
    return f"{stats['nodes']:,.0f} nodes, {depth}{', exhausted' if result.exhausted else ''}"


def _team(result: SearchResult) -> str:
    if result.team is None:
        return ""
    streams = f"{len(result.team.paid):,} streams"
    missing = ", ".join(map(str, result.team.missing))
    return f"{streams}; incomplete, missing searchers {missing}" if missing else streams
