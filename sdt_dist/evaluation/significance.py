"""Differences on the same problems, with an interval and a paired test: between methods, and between runs.

See docs/guides/evaluate.md.

It works on tables of measures and must not know files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sdt_dist.evaluation.tables import Table
from sdt_dist.metrics.aggregate import paired_difference
from sdt_dist.tasks.task import Row

Pairs = list[tuple[int, int]]


class Difference(NamedTuple):
    """Mean of paired differences with its 95% interval, the p of Wilcoxon's signed-rank test, that p after Holm, pairs."""

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    num: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does."""
        return self.low > 0 or self.high < 0


Differences = dict[str, dict[str, Difference]]


def between_methods(table: Table, reference: str, metrics: Sequence[str]) -> Differences:
    """{label: {metric: difference to the reference}} of a run; Holm's correction is over all of them."""
    base = table[reference]
    others = [label for label in table if label != reference]
    return _corrected(
        {
            label: _differences(table[label], base, [(i, i) for i in base], metrics)
            for label in others
        }
    )


def between_runs(before: Table, after: Table, pairs: Pairs, metrics: Sequence[str]) -> Differences:
    """{label: {metric: after minus before}} of labels that both have; pairs: indices of the same problem in each."""
    shared = [label for label in after if label in before]
    turned = [(new, old) for old, new in pairs]
    return _corrected(
        {label: _differences(after[label], before[label], turned, metrics) for label in shared}
    )


def _differences(
    rows: dict[int, Row], base: dict[int, Row], pairs: Pairs, metrics: Sequence[str]
) -> dict[str, Difference]:
    """{metric: difference}, not yet corrected, over the pairs in which both have the metric."""
    found = {}
    for metric in metrics:
        both = [
            (own, other)
            for own, other in pairs
            if metric in rows.get(own, {}) and metric in base.get(other, {})
        ]
        if both:
            own, other = zip(*both, strict=True)
            found[metric] = _difference(
                np.array([rows[i][metric] for i in own]), np.array([base[i][metric] for i in other])
            )
    return found


def _difference(values: np.ndarray, base: np.ndarray) -> Difference:
    from scipy.stats import wilcoxon

    found = paired_difference(values, base)
    # of one pair every sign is as likely, so p is 1; scipy's exact test refuses a single one that is 0
    p = 1.0 if len(values) < 2 else float(wilcoxon(values - base, zero_method="zsplit")[1])  # type: ignore[arg-type]
    return Difference(found["mean"], found["low"], found["high"], p, p, len(values))


def _corrected(found: Differences) -> Differences:
    """With p_holm in place: Holm (1979) over every test of the table."""
    from statsmodels.stats.multitest import multipletests

    places = [(label, metric) for label, row in found.items() for metric in row]
    if not places:
        return found
    corrected = np.asarray(
        multipletests([found[label][metric].p for label, metric in places], method="holm")[1]
    )
    by_place = dict(zip(places, corrected.tolist(), strict=True))
    return {
        label: {
            metric: value._replace(p_holm=by_place[label, metric]) for metric, value in row.items()
        }
        for label, row in found.items()
    }
