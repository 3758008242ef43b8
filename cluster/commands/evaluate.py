"""`sdt evaluate`: compare methods on a dataset at matched cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sdt_dist.evaluation.results import Line

Text, Number, Whole = str | None, float | None, int | None


def evaluate(
    config: Annotated[Text, typer.Argument(help="YAML file; options below override it")] = None,
    dataset: Annotated[Text, typer.Option(help="dataset name, or path of a CSV")] = None,
    methods: Annotated[Text, typer.Option(help="comma-separated, e.g. sample,snis,residual_ts")] = None,
    num_problems: Annotated[Whole, typer.Option(help="problems, evenly chosen")] = None,
    rollouts: Annotated[Whole, typer.Option(help="budget: nfe of about so many rollouts per problem")] = None,
    horizon: Annotated[Whole, typer.Option(help="values to forecast")] = None,
    model: Annotated[Text, typer.Option(help="bundled, a directory or a hub id")] = None,
    reward: Annotated[Text, typer.Option(help="e.g. spectral:gamma=1+nonneg, or path.py:function")] = None,
    inverse_temperature: Annotated[Number, typer.Option(help="lambda of p(x) exp(lambda r(x))")] = None,
    output: Annotated[Path, typer.Option(help="directory of the result files")] = Path("results/evaluation"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with what the directory holds")] = False,
    seed: Annotated[Whole, typer.Option(help="seed of every random draw")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, load no model")] = False,
) -> None:
    """Compare search methods on the same problems, prior and reward, at matched cost.

    Examples:

      sdt evaluate --output results/quickstart

      sdt evaluate --dataset my.csv --horizon 48 --methods sample,snis,residual_ts --num-problems 10

      sdt evaluate examples/etth1_alignment.yaml --output results/etth1 --resume
    """
    from sdt_dist.evaluation.config import load_config
    from sdt_dist.evaluation.results import check_directory
    from sdt_dist.evaluation.runner import make_plan, run_evaluation

    given: dict[str, Any] = {
        "dataset": dataset,
        "methods": None if methods is None else [name.strip() for name in methods.split(",")],
        "num_problems": num_problems,
        "num_rollouts": rollouts,
        "horizon": horizon,
        "model": model,
        "reward": reward,
        "inverse_temperature": inverse_temperature,
        "seed": seed,
    }
    settings = load_config(config, {name: value for name, value in given.items() if value is not None})
    plan = make_plan(settings)
    check_directory(output, settings, plan.problems, resume=resume)
    _announce(plan, output)
    if dry_run:
        return
    with _bar() as progress:
        run_evaluation(plan, output, resume=resume, progress=progress)
    _finish(output)


def _announce(plan: Any, output: Path) -> None:
    import yaml

    config = plan.config
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None), end="")
    print(
        f"plan: {len(plan.problems)} problems x {len(config.methods)} methods, at most {plan.nfe():,} next-token "
        f"distributions, into {output}\n"
    )


def _bar() -> Any:
    """A progress bar with the time that is left, one tick a finished problem and method."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich

    from sdt_dist.evaluation.runner import Progress

    class Bar(Progress):
        def __init__(self) -> None:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._rich = Rich(TextColumn("{task.description:<14}"), *columns)
            self._failed = 0

        def __enter__(self) -> Bar:
            self._rich.start()
            return self

        def __exit__(self, *_: object) -> None:
            self._rich.stop()

        def start(self, total: int) -> None:
            self._task = self._rich.add_task("starting", total=total)

        def done(self, line: Line) -> None:
            self._rich.update(self._task, advance=1, description=line["label"])
            if line["status"] != "ok":
                reason = " ".join(line["error"].split())
                told = f"{line['label']} on {line['name']} failed: {reason}"
                self._rich.console.print(told, markup=False, highlight=False, soft_wrap=True)

    return Bar()


def _finish(output: Path) -> None:
    """The table, where to look further, and exit code 1 when nothing succeeded."""
    import sys

    from sdt_dist.evaluation.figures import draw_all
    from sdt_dist.evaluation.report import print_table
    from sdt_dist.evaluation.results import ResultLog

    lines = ResultLog(output).lines
    if all(line["status"] != "ok" for line in lines):
        reason = " ".join(lines[0]["error"].split()) if lines else "there was none"
        print(f"sdt: every search failed, the first because: {reason}", file=sys.stderr)
        raise typer.Exit(1)
    figures = draw_all(output)
    print_table(output)
    print(f"\n{len(figures)} figures in {output / 'figures'}, table in {output / 'summary.md'}, every sample in "
          f"{output / 'samples.jsonl'}")  # fmt: skip
