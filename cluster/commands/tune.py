"""`sdt tune`: sweep methods and their settings with Ray Tune, all trials on one fleet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdt_dist.errors import ConfigurationError

if TYPE_CHECKING:
    from sdt_dist.actors.config import FleetConfig
    from sdt_dist.data.problems import ForecastProblem
    from sdt_dist.tune.config import SweepConfig
    from sdt_dist.tune.report import Findings

Text = str | None
Whole = int | None


def tune(
    config: Annotated[
        Text, typer.Argument(metavar="[SWEEP.yaml]", help="the sweep; options below override it")
    ] = None,
    output: Annotated[Path, typer.Option(help="directory of trials, report and figures")] = Path(
        "results/sweep"
    ),
    methods: Annotated[
        Text, typer.Option(help="comma-separated, e.g. snis,smc,residual_ts")
    ] = None,
    objectives: Annotated[
        Text, typer.Option(help="comma-separated: crps, spec_w1_gap, wql, mase, nfe")
    ] = None,
    rungs: Annotated[Text, typer.Option(help="growing budgets in rollouts, e.g. 10,30,90")] = None,
    num_trials: Annotated[Whole, typer.Option(help="configurations to try")] = None,
    max_concurrent: Annotated[
        Whole, typer.Option(help="trials beside each other, on one fleet")
    ] = None,
    dataset: Annotated[Text, typer.Option(help="dataset name, or path of a CSV")] = None,
    num_problems: Annotated[Whole, typer.Option(help="problems, evenly chosen")] = None,
    screen: Annotated[
        Text, typer.Option(help="directory with evidence, to rank lambda and gamma first")
    ] = None,
    wandb: Annotated[
        Text, typer.Option(metavar="PROJECT", help="log to Weights & Biases too")
    ] = None,
    address: Annotated[
        Text, typer.Option(help="Ray cluster: auto or host:port; default: this machine alone")
    ] = None,
    servers: Annotated[Whole, typer.Option(help="model servers")] = None,
    searchers: Annotated[Whole, typer.Option(help="searchers, each driving many problems")] = None,
    fleet: Annotated[
        Text, typer.Option(help="YAML file with the fleet's sizes, labels and deadlines")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the sweep in the directory")
    ] = False,
    seed: Annotated[Whole, typer.Option(help="seed of the suggestions")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the plan, start nothing")
    ] = False,
) -> None:
    """Sweep methods, lambda, gamma, alpha and budgets with Optuna and ASHA; all trials share one fleet.

    Examples:

      sdt tune examples/tune_classic.yaml --output results/sweep

      sdt tune --resume --output results/sweep

      sdt tune sweep.yaml --screen results/evidence --num-trials 40 --output results/screened

      sdt tune sweep.yaml --address auto --servers 4 --searchers 8 --max-concurrent 16 --output /shared/sweep

      sdt evaluate results/sweep/best.yaml --output results/best

    With --resume, Ray Tune's own state in the directory is unpickled: resume only directories of your own.
    """
    from sdt_dist.actors.config import load_fleet
    from sdt_dist.extras import check_package
    from sdt_dist.models.spec import outlook_of
    from sdt_dist.tune.config import load_sweep, problems_of

    check_package("optuna", "tune", "a sweep")

    given = {
        "methods": _names(methods),
        "objectives": _names(objectives),
        "rungs": _numbers(rungs),
        "num_trials": num_trials,
        "max_concurrent": max_concurrent,
        "screen": screen,
        "wandb": wandb,
        "seed": seed,
    }
    sizes = {"address": address, "servers": servers, "searchers": searchers}
    shared = _given({"dataset": dataset, "num_problems": num_problems})
    sweep = load_sweep(_source(config, output, resume), _given(given) | {"evaluation": shared})
    is_small = outlook_of(sweep.base.model).is_small
    size = load_fleet(fleet, _given(sizes), small_model=is_small)
    if sweep.base.flow is not None:
        size.check_flows()
    problems = problems_of(sweep)
    _check(sweep, problems, output, resume)
    _announce(sweep, problems, output)
    if dry_run:
        return
    _finish(_run(sweep, problems, output, size, resume), sweep, output)


def _check(sweep: SweepConfig, problems: list[ForecastProblem], output: Path, resume: bool) -> None:
    """What is to be refused before anything starts, besides settings and data."""
    from sdt_dist.tune.screening import Screen, check_screen
    from sdt_dist.tune.sweep import check_directory

    check_directory(output, sweep, resume=resume)
    if sweep.screen is not None:
        check_screen(sweep)
        Screen(sweep.screen, sweep.base, problems)


def _run(
    sweep: SweepConfig,
    problems: list[ForecastProblem],
    output: Path,
    size: FleetConfig,
    resume: bool,
) -> Findings:
    """Screen, sweep under a live view, and report."""
    from sdt_dist.cluster.connect import attached
    from sdt_dist.cluster.live import LiveView
    from sdt_dist.tune.ledger import read_trials
    from sdt_dist.tune.report import write_report
    from sdt_dist.tune.screening import first_points, run_screening, write_screening
    from sdt_dist.tune.sweep import run_sweep

    cells = [] if sweep.screen is None else run_screening(sweep, problems, sweep.screen)
    if sweep.screen is not None:
        write_screening(output, sweep, cells, sweep.screen)
        believed = sum(cell.believable for cell in cells)
        print(
            f"screened {len(cells)} cells of lambda and gamma without a search, {believed} of them with enough effective walks"
        )
    with LiveView() as view:
        view.start(sweep.num_trials)

        def watch(status: dict[str, Any]) -> None:
            view.at(len(read_trials(output)), "trials")
            view.watch(status)

        with attached(size, view.say):
            first = first_points(sweep, cells)
            run_sweep(sweep, problems, output, size, resume=resume, first=first, watch=watch)
        view.at(sweep.num_trials, "trials")
    return write_report(output, sweep, problems)


def _source(config: str | None, output: Path, resume: bool) -> str | Path | None:
    """The file with the sweep: the one that is given, or with --resume the directory's own."""
    if config is not None:
        return config
    if not resume or not (output / "config.yaml").exists():
        raise ConfigurationError(
            "sweep: none given; give SWEEP.yaml, or --resume and --output with a sweep's directory."
        )
    from sdt_dist.tune.sweep import saved_sweep

    saved_sweep(output)
    return output / "config.yaml"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _numbers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(
            f"--rungs: {text!r}, allowed: whole numbers such as 10,30,90."
        ) from error


def _announce(sweep: SweepConfig, problems: list[ForecastProblem], output: Path) -> None:
    import yaml

    print(
        yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, default_flow_style=None),
        end="",
    )
    budgets = " then ".join(str(rollouts) for rollouts in sweep.rungs) if sweep.rungs else "its own"
    how = "stopped early by ASHA" if sweep.asha else "all to the end"
    print(
        f"plan: {sweep.num_trials} trials, {how}, of {len(problems)} problems each at {budgets} rollouts, "
        f"{sweep.max_concurrent} beside each other on one fleet; objectives: {', '.join(sweep.objectives)}; into {output}\n"
    )


def _finish(found: Findings, sweep: SweepConfig, output: Path) -> None:
    """The best trial, where to look further, and exit code 1 when no trial was measured."""
    import sys

    if found.best is None:
        reason = next((line.error for line in found.trials if line.error), "there was none")
        print(f"sdt: every trial failed, the first because: {reason}", file=sys.stderr)
        raise typer.Exit(1)
    values = ", ".join(
        f"{name} {found.best.objectives[name]['mean']:.4g} "
        f"[{found.best.objectives[name]['low']:.4g}, {found.best.objectives[name]['high']:.4g}]"
        for name in sweep.objectives
    )
    print(
        f"\nbest of {len(found.trials)} trials: {found.best.trial} at {found.best.rollouts} rollouts: {values}"
    )
    print(f"parameters: {found.best.parameters}")
    if found.screened is not None:
        print(
            f"screening against paid trials: rank correlation {found.screened['rho']:.2f} ({found.screened['count']} trials)"
        )
    print(
        f"{output / 'best.yaml'} for sdt evaluate, report in {output / 'sweep.html'}, {len(found.figures)} figures in "
        f"{output / 'figures'}; tensorboard --logdir {output / 'tune'}"
    )
