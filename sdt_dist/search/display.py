"""How a result shows itself: ten lines of text, and a table in notebooks.

It must not know what a result is made of; `SearchResult` says that itself, row by row.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from sdt_dist.protocols import Sample
from sdt_dist.values.records import TeamReport

Rows = Mapping[str, str]
_LEFT = 'style="text-align: left"'


def as_text(title: str, rows: Rows) -> str:
    """Rows by name, one a line, below a title; those that say nothing are left out."""
    shown = {name: value for name, value in rows.items() if value}
    width = max(map(len, shown), default=0) + 2
    return "\n".join([title, *(f"  {name:<{width}}{value}" for name, value in shown.items())])


def as_html(title: str, rows: Rows) -> str:
    """The same as a table, with everything escaped: what a model wrote is no markup."""
    lines = [
        f'<tr><th scope="row" {_LEFT}>{html.escape(name)}</th>'
        f"<td {_LEFT}>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
        if value
    ]
    caption = f"<caption {_LEFT}>{html.escape(title)}</caption>"
    return f"<table>{caption}<tbody>{''.join(lines)}</tbody></table>"


def samples_row(samples: Sequence[Sample], num_finished: int) -> str:
    """How many samples of how many sequences, and the range and mean of their rewards."""
    count = f"{len(samples):,} ({num_finished:,} distinct sequences finished)"
    rewards = [sample.reward for sample in samples]
    if not rewards:
        return count
    mean = sum(rewards) / len(rewards)
    return f"{count}, reward {min(rewards):.4g} to {max(rewards):.4g}, mean {mean:.4g}"


def log_z_row(log_z: float | None, error: float | None, is_unbiased: bool) -> str:
    """log Z with one standard error; nothing where a method claims none."""
    if log_z is None:
        return ""
    spread = "" if error is None else f" ± {error:.2g}"
    return f"{log_z:.4g}{spread}{' (Z unbiased)' if is_unbiased else ''}"


def tree_row(stats: Mapping[str, float], is_exhausted: bool) -> str:
    """Size and depth (tokens) of a tree; nothing without one."""
    if not stats:
        return ""
    depth = f"depth {stats['depth_mean']:.3g} on average, {stats['depth_max']:.0f} at most"
    return f"{stats['nodes']:,.0f} nodes, {depth}{', exhausted' if is_exhausted else ''}"


def team_row(team: TeamReport | None) -> str:
    """How many streams of walks a result rests on, and whose are missing."""
    if team is None:
        return ""
    streams = f"{len(team.paid):,} streams"
    missing = ", ".join(map(str, team.missing))
    return f"{streams}; incomplete, missing searchers {missing}" if missing else streams
