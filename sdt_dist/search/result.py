"""What a finished search returns: samples with their own rewards, log Z with its error, cost and tree.

See docs/concepts/target.md#methods.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sdt_dist.errors import SdtError
from sdt_dist.protocols import Sample
from sdt_dist.search import display
from sdt_dist.tree.resample import systematic
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.tree.tree import Tree
from sdt_dist.values.records import TeamReport

Distribution = list[tuple[tuple[int, ...], float]]


@dataclass(frozen=True, slots=True)
class SearchCost:
    """Cost counters of one search (docs/concepts/exactness.md#cost). `model_calls` counts forward passes the search took part in."""

    nfe: int = 0
    model_calls: int = 0
    rollouts: int = 0
    reward_calls: int = 0
    recomputed_tokens: int = 0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True, repr=False)
class SearchResult:
    """Samples of pi*(x) ~ p(x|c) exp(lambda r(x)) as one method draws them, and how sure it is.

    `weights` are the samples' normalised weights in the method's own estimate (equal after resampling).
    `log_z` estimates log E_p[exp(lambda r)]; None where a method claims none. `log_z_error` is one standard
    error of log_z; `log_z_unbiased` says whether exp(log_z) is an unbiased estimate of Z.
    `finished` holds every distinct finished sample the search paid for, with its own reward; `probabilities` [S] is
    the law over (the first S of) them that `samples` were drawn from, where there is one. `snapshot` (tree methods)
    is the search as arrays: `result.snapshot.save(path)`, then `sdt.search(..., resume=path)` with more budget. `team`
    says what a member of several searches of one problem has seen of the others. `flow` is the identity of the flow that
    it proposed with.
    """

    method: str
    seed: int
    samples: list[Sample]
    weights: list[float]
    best: Sample
    finished: list[Sample]
    cost: SearchCost
    log_z: float | None = None
    log_z_error: float | None = None
    log_z_unbiased: bool = False
    ess: float | None = None
    exhausted: bool = False
    deterministic: bool = True
    tree_stats: dict[str, float] = field(default_factory=dict)
    tree: Tree | None = None
    snapshot: Snapshot | None = None
    probabilities: np.ndarray | None = None
    team: TeamReport | None = None
    flow: str | None = None

    def __repr__(self) -> str:
        return display.as_text(self._title(), self._rows())

    def _repr_html_(self) -> str:
        return display.as_html(self._title(), self._rows())

    def _title(self) -> str:
        repeats = "" if self.deterministic else ", not repeatable bit for bit"
        return f"SearchResult of {self.method} (seed {self.seed}{repeats})"

    def _rows(self) -> dict[str, str]:
        """What there is to say of it by name; empty where its method claims nothing."""
        cost = self.cost
        calls = f"{cost.model_calls:,} model calls"
        return {
            "samples": display.samples_row(self.samples, len(self.finished)),
            "best": str(self.best),
            "log Z": display.log_z_row(self.log_z, self.log_z_error, self.log_z_unbiased),
            "ESS": "" if self.ess is None else f"{self.ess:.4g}",
            "nfe": f"{cost.nfe:,} next-token distributions in {calls}",
            "cost": f"{cost.rollouts:,} rollouts, {cost.reward_calls:,} reward calls, {cost.wall_s:.3g} s",
            "tree": display.tree_row(self.tree_stats, self.exhausted),
            "flow": self.flow or "",
            "team": display.team_row(self.team),
        }

    def distribution(self) -> Distribution:
        """The exact distribution that `samples` are drawn from given the finished search.

        Returns (tokens without the end token, probability) pairs that sum to 1.
        Raises SdtError for methods whose samples are not draws from a finite list.
        """
        if self.probabilities is None:
            raise SdtError(
                f"the samples of method {self.method!r} (as configured) are not draws from a finite list; "
                "residual_ts with draw='path', snis, smc, dts and maxent_ts have a distribution()."
            )
        pairs = zip(self.finished, self.probabilities.tolist(), strict=False)
        return [(sample.tokens, probability) for sample, probability in pairs if probability > 0]

    def draw(self, num_samples: int, seed: int = 0) -> list[Sample]:
        """More samples from `distribution()`, without a model call. Raises SdtError like it."""
        self.distribution()
        assert self.probabilities is not None
        rng = np.random.default_rng([self.seed, seed])
        return [self.finished[i] for i in systematic(self.probabilities, num_samples, rng)]

    @property
    def complete(self) -> bool:
        """Whether everything that its team was to contribute is in it; always true of a search on its own."""
        return self.team is None or not self.team.missing

    @property
    def nfe(self) -> int:
        return self.cost.nfe

    @property
    def model_calls(self) -> int:
        return self.cost.model_calls

    @property
    def rollouts(self) -> int:
        return self.cost.rollouts

    @property
    def wall_s(self) -> float:
        return self.cost.wall_s
