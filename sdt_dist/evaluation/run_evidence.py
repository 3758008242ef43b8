"""The evidence side of one run: what its searches share, start from and leave behind.

See docs/concepts/exactness.md#shared-evidence. It must not know who searches.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

from sdt_dist.evaluation.evidence import check_warm, evidence_keys, keep_evidence, load_evidence
from sdt_dist.evaluation.plan import Plan, PlannedMethod
from sdt_dist.rewards.spec import reward_identity
from sdt_dist.search.sharing_plan import SharingPlan
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.values.store import EvidenceStore

Keys = dict[int, str]


class RunEvidence:
    """The sharing of every method of a run, and where kept walks go.

    A method's keys are those of its own reward, so methods whose rewards only weigh the same terms differently start from the
    same evidence, and others never do. A run that neither shares nor keeps evidence does nothing here. ConfigurationError where
    warm_start fits no problem of a method.
    """

    def __init__(self, plan: Plan, output: Path) -> None:
        config = plan.config
        self._config = config
        self._output = output
        self._run = secrets.token_hex(8)
        is_used = config.shares_evidence or config.keep_evidence
        users = [method for method in plan.methods if is_used and method.has_walks]
        self._keys = _keys_by_label(plan, users)
        self._warm: EvidenceStore | None = None
        if config.warm_start is not None:
            self._warm = load_evidence(config.warm_start)
            for keys in self._keys.values():
                check_warm(self._warm, keys, config.warm_start)

    def sharing(self, method: PlannedMethod) -> SharingPlan | None:
        """How a method's searches share; None where each is on its own."""
        if not self._config.shares_evidence:
            return None
        return SharingPlan(
            run=f"{self._run}/{method.label}",
            keys=self._keys[method.label],
            searchers_per_problem=self._config.searchers_per_problem,
            warm=self._warm,
        )

    def is_kept(self, method: PlannedMethod) -> bool:
        """Whether the walks of a method's searches are written beside the results."""
        return self._config.keep_evidence and method.has_walks

    def keep(self, method: PlannedMethod, problem: int, snapshot: Snapshot) -> None:
        """Keep the walks of a finished search. ResultsError when the disk refuses."""
        key = self._keys[method.label][problem]
        keep_evidence(self._output, method.label, problem, key, snapshot, self._run)


def _keys_by_label(plan: Plan, users: Iterable[PlannedMethod]) -> dict[str, Keys]:
    """The evidence keys of each problem, by the method's label; computed once for rewards of the same terms."""
    by_terms: dict[str, Keys] = {}
    by_label: dict[str, Keys] = {}
    for method in users:
        terms = reward_identity(method.reward.spec)
        if terms not in by_terms:
            by_terms[terms] = evidence_keys(plan.config, plan.problems, method.reward.spec)
        by_label[method.label] = by_terms[terms]
    return by_label
