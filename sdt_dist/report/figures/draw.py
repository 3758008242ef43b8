"""Every figure of a run, drawn from its result files only: every point was measured.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from sdt_dist.report.figures.ablation import ablation
from sdt_dist.report.figures.cost import diversity_against_reward, quality_against_cost
from sdt_dist.report.figures.files import draw
from sdt_dist.report.figures.run import Run
from sdt_dist.report.figures.samples import fans, log_z_and_ess, reward_distributions, spectra
from sdt_dist.report.figures.tree import first_tree

Painter = Callable[[Run], Figure | None]
PAINTERS: dict[str, Painter] = {
    "ablation": ablation,
    "quality_cost": quality_against_cost,
    "rewards": reward_distributions,
    "spectra": spectra,
    "fans": fans,
    "diversity": diversity_against_reward,
    "log_z": log_z_and_ess,
    "tree": first_tree,
}
OF_EVERY_SEARCH = ("ablation", "rewards", "diversity", "log_z", "tree")


def draw_all(
    directory: Path, folder: Path | None = None, suffixes: Sequence[str] = (".png",)
) -> list[Path]:
    """Draw every figure that the run's files support; returns the paths, none where every search failed.

    folder: default figures/ of the run; suffixes: of the files of each figure, of which the first's paths are returned.
    ResultsError when the disk refuses.
    """
    run = Run(directory)
    folder = folder or directory / "figures"
    if not run.lines:
        return []
    wanted = (*OF_EVERY_SEARCH, *run.config.task.figures)
    painters = {name: partial(PAINTERS[name], run) for name in PAINTERS if name in wanted}
    return draw(painters, folder, suffixes)
