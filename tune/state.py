"""What a sweep's directory knows of its trials, and whether Ray Tune's own state in it can be restored.

See docs/guides/sweeps.md.

Tune copies its state over the old one every few seconds, so a kill may leave it torn, or without the newest trials. The
trials' own directories are never torn. The state is a pickle of the user's own directory, and is loaded as such.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

from sdt_dist.extras import packages_of

with packages_of("tune", "a sweep"):
    from ray import tune as ray_tune

from sdt_dist.tune.ledger import read_trials
from sdt_dist.tune.space import Parameters
from sdt_dist.tune.trial import PARAMETERS, trial_name

_LOG = logging.getLogger(__name__)


def known_parameters(output: Path) -> list[Parameters]:
    """The parameters of every trial that began, in the order in which they did."""
    paths = sorted(
        (output / "trials").glob(f"*/{PARAMETERS}"), key=lambda path: path.stat().st_mtime
    )
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def ended_rungs(output: Path) -> dict[str, int]:
    """The last budget of every trial that has ended without an error: it must not be given a further one."""
    return {
        line.trial: line.rollouts
        for line in read_trials(output)
        if line.status != "failed" and line.rollouts
    }


def is_restorable(folder: Path, begun: list[Parameters]) -> bool:
    """Whether Tune's state is whole and knows every trial that began."""
    states = sorted(folder.glob("experiment_state-*.json"))
    pickles = [
        folder / "tuner.pkl",
        *folder.glob("searcher-state-*.pkl"),
        *folder.glob("search_gen_state-*.json"),
    ]
    if not states or len(pickles) < 3 or not ray_tune.Tuner.can_restore(str(folder)):
        return False
    try:
        trials = json.loads(states[-1].read_text(encoding="utf-8"))["trial_data"]
        held = {trial_name(json.loads(state)["config"]) for state, _ in trials}
        for path in pickles:
            pickle.loads(path.read_bytes())
    except Exception as error:  # noqa: BLE001 (a torn pickle may raise anything)
        _LOG.warning(
            "Tune's state in %s is torn (%s): a new study takes its trials up.", folder, error
        )
        return False
    lost = {trial_name(parameters) for parameters in begun} - held
    if lost:
        _LOG.warning(
            "Tune's state in %s lacks %d trials: a new study takes all of them up.",
            folder,
            len(lost),
        )
    return not lost


def set_aside(folder: Path) -> None:
    """Move a state that cannot be restored out of the way."""
    if folder.exists():
        number = sum(1 for _ in folder.parent.glob(f"{folder.name}-*"))
        shutil.move(folder, folder.with_name(f"{folder.name}-{number}"))
