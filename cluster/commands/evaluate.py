"""`sdt evaluate`: compare methods on a dataset at matched cost."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sdt_dist.actors.config import FleetConfig
    from sdt_dist.cluster.live import LiveView
    from sdt_dist.evaluation.config import EvaluationConfig
    from sdt_dist.evaluation.executor import Executor
    from sdt_dist.evaluation.plan import Plan

Text = str | None
Number = float | None
Whole = int | None
_NO_RAY = "sdt: Ray is not installed, so this process makes the searches; for a fleet: pip install 'sdt-dist[cluster]'."


def evaluate(
    config: Annotated[Text, typer.Argument(help="YAML file; options below override it")] = None,
    dataset: Annotated[Text, typer.Option(help="dataset name, or path of a CSV")] = None,
    methods: Annotated[
        Text, typer.Option(help="comma-separated, e.g. sample,snis,residual_ts")
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(help="values to sweep, e.g. rollouts=5,10,20; repeat for a product"),
    ] = None,
    num_problems: Annotated[Whole, typer.Option(help="problems, evenly chosen")] = None,
    rollouts: Annotated[
        Whole, typer.Option(help="budget: nfe of about so many rollouts per problem")
    ] = None,
    horizon: Annotated[Whole, typer.Option(help="values to forecast")] = None,
    model: Annotated[Text, typer.Option(help="bundled, a directory or a hub id")] = None,
    reward: Annotated[
        Text, typer.Option(help="e.g. spectral:gamma=1+nonneg, or path.py:function")
    ] = None,
    inverse_temperature: Annotated[
        Number, typer.Option(help="lambda of p(x) exp(lambda r(x))")
    ] = None,
    flow: Annotated[
        Text, typer.Option(help="flow checkpoint, or bundled, for s_adt, snis+flow, smc+flow")
    ] = None,
    searchers_per_problem: Annotated[
        Whole, typer.Option(help="searchers that share one problem (residual_ts)")
    ] = None,
    warm_start: Annotated[
        Text, typer.Option(help="directory with evidence of an earlier run (residual_ts)")
    ] = None,
    address: Annotated[
        Text, typer.Option(help="Ray cluster: auto or host:port; default: this machine alone")
    ] = None,
    servers: Annotated[Whole, typer.Option(help="model servers of --model")] = None,
    searchers: Annotated[Whole, typer.Option(help="searchers, each driving many problems")] = None,
    fleet: Annotated[
        Text, typer.Option(help="YAML file with the fleet's sizes, labels and deadlines")
    ] = None,
    output: Annotated[Path, typer.Option(help="directory of the result files")] = Path(
        "results/evaluation"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with what the directory holds")
    ] = False,
    seed: Annotated[Whole, typer.Option(help="seed of every random draw")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the plan, load no model")
    ] = False,
) -> None:
    """Compare search methods on the same problems, prior and reward, at matched cost.

    Examples:

      sdt evaluate --output results/quickstart

      sdt evaluate --dataset my.csv --horizon 48 --methods sample,snis,residual_ts --num-problems 10

      sdt evaluate examples/etth1_alignment.yaml --output results/etth1 --resume

      sdt evaluate --methods snis,residual_ts,s_adt --flow runs/flow

      sdt evaluate --methods residual_ts,dts --ablate rollouts=5,10,20,50,100 --ablate lambda=1,3 --output results/ablation

      sdt evaluate --address auto --servers 4 --searchers 8 --output results/cluster
    """
    from sdt_dist.evaluation.ablation import parse_ablations
    from sdt_dist.evaluation.directory import RunDirectory
    from sdt_dist.evaluation.plan import load_config, resolve, with_problems
    from sdt_dist.evaluation.runner import run_evaluation

    given: dict[str, Any] = {
        "dataset": dataset,
        "methods": None if methods is None else [name.strip() for name in methods.split(",")],
        "ablate": parse_ablations(ablate) if ablate else None,
        "num_problems": num_problems,
        "num_rollouts": rollouts,
        "horizon": horizon,
        "model": model,
        "reward": reward,
        "inverse_temperature": inverse_temperature,
        "seed": seed,
        "searchers_per_problem": searchers_per_problem,
        "warm_start": warm_start,
        "flow": flow,
    }
    sizes = {"address": address, "servers": servers, "searchers": searchers}
    # 1. Everything that can be refused is, before anything is searched or written.
    plan = resolve(load_config(config, _without_none(given)))
    size = _fleet_size(plan.config, fleet, _without_none(sizes))
    plan = with_problems(plan)
    directory = RunDirectory(output, plan, resume=resume)
    _announce(plan, output)
    if dry_run:
        return
    # 2. The searches, on a fleet where there is Ray.
    from sdt_dist.cluster.live import LiveView

    if size is None:
        print(_NO_RAY, file=sys.stderr)
    with LiveView() as view:
        run_evaluation(
            plan,
            directory,
            executor=_executor(plan.config, size, view),
            progress=view,
            servers=None if size is None else _servers(plan.config, size),
        )
    # 3. The table and the figures.
    _finish(output)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _fleet_size(
    config: EvaluationConfig, path: str | None, sizes: dict[str, Any]
) -> FleetConfig | None:
    """The fleet to search on; None where there is no Ray, so that this process searches.

    MissingExtraError where a fleet was asked for and there is no Ray.
    """
    from sdt_dist.actors.config import load_fleet
    from sdt_dist.cluster.connect import has_ray
    from sdt_dist.extras import missing_extra
    from sdt_dist.models.forecaster.spec import forecaster_directory

    if not has_ray():
        asked = [f"--{name}" for name in sizes] + ["--fleet"] * (path is not None)
        if asked:
            raise missing_extra(", ".join(asked), "ray", "cluster")
        return None
    is_forecaster = forecaster_directory(config.model) is not None
    size = load_fleet(path, sizes, small_model=is_forecaster)
    if config.flow is not None:
        size.check_flows()
    return size


def _executor(config: EvaluationConfig, size: FleetConfig | None, view: LiveView) -> Executor:
    """Who makes the searches; Ray is started or attached to when the first one is wanted."""
    if size is None:
        from sdt_dist.evaluation.executor import InProcess

        return InProcess()
    from sdt_dist.actors.evaluation import OnFleet
    from sdt_dist.cluster.connect import attached

    connect = partial(attached, size, view.say, shards=config.shares_evidence)
    return OnFleet(size, watch=view.watch, connect=connect)


def _servers(config: EvaluationConfig, size: FleetConfig) -> list[dict[str, Any]]:
    """Who answers for the model, for environment.json."""
    from sdt_dist.evaluation.environment import server_record

    records = [server_record(config.model, size.servers)]
    for group in size.more_servers:
        records.append(server_record(group.model, group.count))
    return records


def _announce(plan: Plan, output: Path) -> None:
    import yaml

    config = plan.config
    settings = config.model_dump(mode="json")
    print(yaml.safe_dump(settings, sort_keys=False, default_flow_style=None), end="")
    print(
        f"plan: {len(plan.problems)} problems x {len(plan.methods)} methods, at most {plan.nfe():,} next-token "
        f"distributions, into {output}"
    )
    if plan.flow is not None:
        users = ", ".join(method.label for method in plan.methods if method.flow)
        print(f"flow: version {plan.flow.head.info.version} of {config.flow}, used by {users}")
    print()


def _finish(output: Path) -> None:
    """The table, where to look further, and exit code 1 when nothing succeeded."""
    from sdt_dist.evaluation.results import ResultLog
    from sdt_dist.report.figures.draw import draw_all
    from sdt_dist.report.write import print_table

    lines = ResultLog(output).lines
    if all(line["status"] != "ok" for line in lines):
        reason = " ".join(lines[0]["error"].split()) if lines else "there was none"
        print(f"sdt: every search failed, the first because: {reason}", file=sys.stderr)
        raise typer.Exit(1)
    figures = draw_all(output)
    print_table(output)
    print(f"\n{len(figures)} figures in {output / 'figures'}, table in {output / 'summary.md'}, every sample in "
          f"{output / 'samples.jsonl'}")  # fmt: skip
    print(f"a report on one page: sdt report {output}")
