"""A sweep: Ray Tune with Optuna and ASHA over trials that share one fleet; resumable after a kill.

See docs/guides/sweeps.md.

The directory: config.yaml, trials/ (every trial's evaluations; the truth), trials.jsonl, tune/ (Ray Tune's state, pickled,
and TensorBoard's files). Tune's state is restored where it is whole (`state.py`); else a new study starts with the
configurations that are on disk, whose searches are not made again.
"""

from __future__ import annotations

import _thread
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sdt_dist.extras import packages_of

with packages_of("tune", "a sweep"):
    import optuna
    import ray
    from ray import tune as ray_tune
    from ray.tune.search.optuna import OptunaSearch

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.fleet import Watch
from sdt_dist.actors.work import Loader, load_spec
from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import FleetError, ResultsError
from sdt_dist.evaluation.checks import read_flow
from sdt_dist.evaluation.results import read_saved
from sdt_dist.files import write_text
from sdt_dist.tune.config import SweepConfig
from sdt_dist.tune.fleet import SharedFleet
from sdt_dist.tune.ledger import Ledger, TrialLine, line_of, read_trials, write_trials
from sdt_dist.tune.measurer import start_measurer
from sdt_dist.tune.objectives import OBJECTIVES
from sdt_dist.tune.scheduler import scheduler_of
from sdt_dist.tune.screening import SCREENING
from sdt_dist.tune.space import Parameters
from sdt_dist.tune.state import ended_rungs, is_restorable, known_parameters, set_aside
from sdt_dist.tune.trial import Common, run_trial

CONFIG = "config.yaml"
STATE = "tune"
_MAX_FAILURES = 2  # a process that died is started again; an error of its own comes back at once, as its lines are on disk


def check_directory(output: Path, sweep: SweepConfig, *, resume: bool) -> None:
    """ResultsError when an output directory holds another sweep, something else, or this sweep without `resume`."""
    path = output / CONFIG
    if not path.exists():
        before = (one.name for one in output.iterdir()) if output.is_dir() else ()
        if any(
            name != SCREENING and not name.endswith(".tmp") for name in before
        ):  # a kill may leave these
            raise ResultsError(
                f"output: {output} holds no sweep but is not empty; give another directory."
            )
        return
    known = saved_sweep(output).identity()
    now = sweep.identity()
    different = sorted(key for key in now if known.get(key) != now[key])
    if different:
        field = different[0]
        raise ResultsError(
            f"output: {output} holds a sweep of another configuration ({field}: {known.get(field)!r}, now {now[field]!r}); "
            "give another directory."
        )
    if not resume:
        raise ResultsError(
            f"output: {output} already holds this sweep; add --resume, or give another directory."
        )


def saved_sweep(output: Path) -> SweepConfig:
    """The configuration of the sweep in a directory; ResultsError when it holds none."""
    return read_saved(output / CONFIG, SweepConfig, "sdt tune")


def run_sweep(
    sweep: SweepConfig,
    problems: Sequence[ForecastProblem],
    output: Path,
    size: FleetConfig,
    *,
    resume: bool = False,
    first: Sequence[Parameters] = (),
    watch: Watch | None = None,
    loader: Loader | None = None,
) -> list[TrialLine]:
    """Make the sweep's trials on one fleet of the Ray instance that is connected, or go on with them; the trials' lines.

    first: parameters to try first, of which Optuna draws what is missing. `loader` replaces `load_model` in the model servers.
    Raises FleetError when the fleet cannot go on, KeyboardInterrupt when it was stopped; both leave what `resume` goes on from.
    """
    check_directory(output, sweep, resume=resume)
    write_text(
        output / CONFIG,
        yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, default_flow_style=None),
    )
    base = sweep.base
    flows = [] if base.flow is None else [read_flow(base.flow, base.flow_identity)]
    load = loader or partial(load_spec, base.model)
    fleet = SharedFleet(
        size, load, horizon=base.horizon, flows=flows, watch=watch, failed=_thread.interrupt_main
    )
    try:
        with _quiet(), fleet:
            actors = fleet.exchange, start_measurer()
            common = Common(
                sweep, list(problems), output.resolve(), Path.cwd(), *actors, ended_rungs(output)
            )
            results = _tuner(common, first).fit()
    except KeyboardInterrupt:
        raise fleet.error or KeyboardInterrupt() from None
    if fleet.error is not None:
        raise fleet.error
    write_trials(output, [_line(sweep, result) for result in results])
    return read_trials(output)


def _line(sweep: SweepConfig, result: Any) -> TrialLine:
    error = None if result.error is None else " ".join(str(result.error).split())[-500:]
    return line_of(result.config, result.metrics, sweep.budgets(result.config)[-1], error)


def _tuner(common: Common, first: Sequence[Parameters]) -> ray_tune.Tuner:
    """The tuner in the output directory where its state is whole, else a new one that tries what is on disk first."""
    sweep = common.sweep
    folder = common.output / STATE
    trainable = ray_tune.with_parameters(run_trial, common=common)
    resources = ray_tune.PlacementGroupFactory([_beside_us()])
    begun = known_parameters(common.output)
    if is_restorable(folder, begun):
        return ray_tune.Tuner.restore(
            str(folder),
            trainable=ray_tune.with_resources(trainable, resources),
            resume_errored=True,
        )
    set_aside(folder)
    return ray_tune.Tuner(
        ray_tune.with_resources(trainable, resources),
        tune_config=ray_tune.TuneConfig(
            search_alg=_optuna(sweep, begun, first),
            scheduler=scheduler_of(sweep),
            num_samples=sweep.num_trials,
            max_concurrent_trials=sweep.max_concurrent,
            reuse_actors=True,
            trial_dirname_creator=_directory_name,
        ),
        run_config=ray_tune.RunConfig(
            name=STATE,
            storage_path=str(common.output),
            failure_config=ray_tune.FailureConfig(max_failures=_MAX_FAILURES),
            callbacks=[Ledger(common.output, sweep.rungs), *_wandb(sweep)],
            verbose=0,
        ),
    )


def _optuna(
    sweep: SweepConfig, begun: Sequence[Parameters], first: Sequence[Parameters]
) -> OptunaSearch:
    """Optuna's TPE, define-by-run; of several objectives none is told before a trial's end (Ray's `OptunaSearch`).

    A study that takes up trials that `begun` draws by another seed, or it would draw these once more.
    """
    points = [*begun, *first][: sweep.num_trials]
    chosen = [OBJECTIVES[name] for name in sweep.objectives]
    several = len(chosen) > 1
    return OptunaSearch(
        space=sweep.search_space,
        metric=[one.name for one in chosen] if several else chosen[0].name,
        mode=[one.mode for one in chosen] if several else chosen[0].mode,
        points_to_evaluate=[dict(point) for point in points] or None,
        seed=sweep.seed + len(begun),
    )


def _beside_us() -> dict[str, float]:
    """The bundle of a trial: on the driver's node, where the output directory is; it asks for no CPU, as models have their own."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    name = next(
        (name for name in node["Resources"] if name.startswith("node:") and "internal" not in name),
        None,
    )
    if name is None:
        raise FleetError(
            f"this node ({here}) names no resource of its own; start Ray with its usual resources."
        )
    return {name: 0.001}


def _directory_name(trial: Any) -> str:
    return f"{trial.config['method']}-{trial.trial_id}"


def _wandb(sweep: SweepConfig) -> list[Any]:
    if sweep.wandb is None:
        return []
    from ray.air.integrations.wandb import WandbLoggerCallback

    return [WandbLoggerCallback(project=sweep.wandb)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither Tune nor Optuna reports what our own view shows, and Ctrl-C ends a sweep at once; Tune saves its state often."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The reported value is ignored because this `step"
        )
        yield
