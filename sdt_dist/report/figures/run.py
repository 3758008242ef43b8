"""The files of one run as figures and reports see them, read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdt_dist.evaluation.labels import family, middle
from sdt_dist.evaluation.results import Line, read_lines, read_problems, saved_config
from sdt_dist.report.figures.axes import style_of

Lines = dict[str, dict[int, Line]]
_ALIGNED = ("s_adt", "residual_ts", "snis", "smc", "maxent_ts", "dts")
_CROWD = 14  # curves that a figure can tell apart


class Run:
    """The files of one run, read once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.problems = {problem.index: problem for problem in read_problems(directory)}
        self.lines: Lines = {}
        for line in read_lines(directory):
            if line["status"] == "ok":
                self.lines.setdefault(line["label"], {})[line["problem"]] = line
        self.summary = json.loads((directory / "summary.json").read_text())
        self.truth = json.loads((directory / "truth.json").read_text())
        self.config = saved_config(directory)
        self.methods = {method.label: method for method in self.config.method_configs()}

    @property
    def base(self) -> str | None:
        """The label of plain sampling."""
        return self._first(("sample",))

    @property
    def aligned(self) -> str | None:
        """The label shown as "aligned": the first tree or particle sampler of the run, at the middle of an ablation."""
        return self._first(_ALIGNED)

    @property
    def horizon(self) -> int:
        return min(len(problem.truth) for problem in self.problems.values())

    def style(self, label: str) -> dict[str, Any]:
        """Colour and marker of a label, the same in every figure of the run."""
        return style_of(self.place(label))

    def place(self, label: str) -> int:
        """The place of a label's curve among all, those of `curves` first."""
        return list(dict.fromkeys([*self.curves(), *map(self._curve, self.lines)])).index(
            self._curve(label)
        )

    def curves(self) -> dict[str, list[str]]:
        """{name: labels}: labels that differ in their rollouts alone are one curve, by rollouts.

        Of an ablation with too many curves to tell apart, the middle ones; `ablation` shows the others.
        """
        found: dict[str, list[str]] = {}
        for label in self.lines:
            found.setdefault(self._curve(label), []).append(label)
        if self.is_crowded:
            central = set(middle(self.config))
            found = {
                curve: labels for curve, labels in found.items() if central.intersection(labels)
            }
        return {curve: sorted(labels, key=self._rollouts) for curve, labels in found.items()}

    @property
    def is_crowded(self) -> bool:
        """Whether an ablation has more curves than a figure can tell apart."""
        return bool(self.config.ablate) and len(set(map(self._curve, self.lines))) > _CROWD

    @property
    def reward_note(self) -> str:
        """What to add to the name of rewards where they do not compare."""
        rewards = {self.config.reward_of(method) for method in self.methods.values()}
        return "; every label by its own reward" if len(rewards) > 1 else ""

    def _curve(self, label: str) -> str:
        return family(self.methods[label], "rollouts")

    def _rollouts(self, label: str) -> float:
        return self.methods[label].ablated.get("rollouts", 0)

    def _first(self, methods: tuple[str, ...]) -> str | None:
        labels = [*(label for label in middle(self.config) if label in self.lines), *self.lines]
        return next(
            (label for name in methods for label in labels if self.methods[label].name == name),
            None,
        )
