"""`sdt train-flow`: train the learned soft value F of a model and a reward, for s_adt, snis and smc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdt_dist.errors import ConfigurationError

Text = str | None
Number = float | None
Whole = int | None


def train_flow(
    output: Annotated[
        Path, typer.Option(help="directory of the flow, its versions, curves and card")
    ],
    more_trees: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR]...", help="more directories for --trees")
    ] = None,
    trees: Annotated[
        list[str] | None, typer.Option(metavar="DIR...", help="train on the searches kept there")
    ] = None,
    config: Annotated[Text, typer.Option(help="YAML file; the other options override it")] = None,
    model: Annotated[Text, typer.Option(help="bundled, a directory or a hub id")] = None,
    reward: Annotated[Text, typer.Option(help="e.g. spectral:gamma=1, or path.py:function")] = None,
    max_new_tokens: Annotated[
        Whole, typer.Option(help="tokens of a sample; a forecaster's horizon")
    ] = None,
    rounds: Annotated[
        Whole, typer.Option(help="rounds, each ending with a published version")
    ] = None,
    contexts_per_round: Annotated[
        Whole, typer.Option(help="contexts that a round searches")
    ] = None,
    rollouts: Annotated[Whole, typer.Option(help="rollouts a context")] = None,
    steps_per_round: Annotated[Whole, typer.Option(help="gradient steps a round")] = None,
    method: Annotated[Text, typer.Option(help="method of the searches without the flow")] = None,
    flow_method: Annotated[
        Text, typer.Option(help="method of the searches with the newest flow")
    ] = None,
    flow_share: Annotated[
        Number, typer.Option(help="share of the rollouts that are made with it")
    ] = None,
    dataset: Annotated[
        Text, typer.Option(help="contexts from a dataset's training part; default: synthetic")
    ] = None,
    end_row: Annotated[Whole, typer.Option(help="use rows before this one only")] = None,
    prompts: Annotated[
        Text, typer.Option(help="contexts from a text file, one prompt a line")
    ] = None,
    lowest_inverse_temperature: Annotated[
        Number, typer.Option(help="smallest lambda it is trained for")
    ] = None,
    highest_inverse_temperature: Annotated[
        Number, typer.Option(help="largest lambda it is trained for")
    ] = None,
    learning_rate: Annotated[Number, typer.Option(help="AdamW's, after warm-up")] = None,
    num_children: Annotated[
        Whole, typer.Option(min=0, help="candidates a step; 0 for complete rows")
    ] = None,
    hidden_size: Annotated[Whole, typer.Option(help="width of the network")] = None,
    num_layers: Annotated[Whole, typer.Option(help="layers of its trunk")] = None,
    key_size: Annotated[
        Whole, typer.Option(help="width in which states and tokens are multiplied")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="any other setting")
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="learn while a fleet searches; the same seed gives another flow"
        ),
    ] = False,
    address: Annotated[
        Text, typer.Option(help="live: Ray cluster, auto or host:port; default: this machine")
    ] = None,
    servers: Annotated[Whole, typer.Option(help="live: model servers of --model")] = None,
    searchers: Annotated[
        Whole, typer.Option(help="live: searchers, each driving many contexts")
    ] = None,
    fleet: Annotated[
        Text, typer.Option(help="live: YAML file with the fleet's sizes, labels and deadlines")
    ] = None,
    seed: Annotated[Whole, typer.Option(help="seed of every random draw")] = None,
    device: Annotated[Text, typer.Option(help="cpu or cuda")] = None,
    threads: Annotated[
        Whole, typer.Option(help="torch threads; with 1 a training repeats to the bit")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the training in the directory")
    ] = False,
) -> None:
    """Train F(s), the learned soft value that s_adt, snis and smc propose with, on fresh searches or on saved ones.

    Examples:

      sdt train-flow --config examples/flow_bundled.yaml --output runs/flow

      sdt train-flow --model bundled --reward spectral:gamma=1 --contexts-per-round 64 --set held_out_contexts=8 --output runs/flow

      sdt train-flow --trees results/a results/b --model bundled --reward spectral:gamma=1 --output runs/flow

      sdt train-flow --config flow.yaml --set bellman=0.5 --set replay_capacity=8000 --output runs/flow --resume

      sdt train-flow --live --searchers 2 --rounds 20 --output runs/flow

    With --live, model servers and searchers work on while a learner takes rounds x steps-per-round steps and publishes a
    version after each steps-per-round, which later searches use. Searches end with the last step, so their number is up to
    timing, and so is the flow: a live training is not repeatable from its seed. Without --live, a training is.
    """
    given = dict(locals())
    for name in ("output", "config", "resume", "more_trees", "setting", *_FLEET):
        del given[name]
    sizes = {"address": address, "servers": servers, "searchers": searchers}
    from sdt_dist.training.flow.config import load_train_config

    if more_trees and not trees:
        raise ConfigurationError(
            f"arguments: {more_trees[0]!r} is not expected; directories go after --trees."
        )
    given["trees"] = [*(trees or []), *(more_trees or [])] or None
    given["live"] = live or None
    values = {name: value for name, value in given.items() if value is not None}
    if num_children == 0:
        values["num_children"] = None
    settings = load_train_config(config, values | _settings(setting or []))
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if not settings.live and (sizes or fleet):
        raise ConfigurationError(
            f"--{next(iter(sizes), 'fleet')}: given without --live; leave it out, or learn live."
        )
    if settings.live:
        _train_live(settings, output, _load_fleet(fleet, sizes, settings.model), resume)
    else:
        _train(settings, output, resume)


def _load_fleet(path: str | None, sizes: dict[str, Any], model: str) -> Any:
    from sdt_dist.actors.config import load_fleet
    from sdt_dist.models.forecaster.spec import forecaster_directory

    return load_fleet(path, sizes, small_model=forecaster_directory(model) is not None)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Settings by name from NAME=VALUE texts, whose values are YAML."""
    import yaml

    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigurationError(
                f"--set: {pair!r} has no YAML value; give NAME=VALUE."
            ) from error
        if not equals:
            raise ConfigurationError(f"--set: {pair!r}, allowed: NAME=VALUE.")
    return found


def _train(settings: Any, output: Path, resume: bool) -> None:
    """Train under a bar that starts with the work, so that a mistake is told without one."""
    from sdt_dist.cluster.bars import progress_bar
    from sdt_dist.training.flow.train import Watch, train_flow

    total = settings.rounds * settings.steps_per_round
    bar = progress_bar()
    task = bar.add_task("training", total=total)

    class Bar(Watch):
        def searching(self, round_number: int) -> None:
            bar.start()
            bar.update(
                task,
                description=f"round {round_number + 1}/{settings.rounds + settings.rounds_ahead}: gathering",
            )

        def step(self, step: int) -> None:
            bar.start()
            number = (step - 1) // settings.steps_per_round + 1
            bar.update(
                task, completed=step, description=f"version {number}/{settings.rounds}: training"
            )

    try:
        learner = train_flow(settings, output, resume=resume, watch=Bar())
    finally:
        bar.stop()
    _finish(learner, output)
    for found in learner.progress.held_out[-1:]:
        verdict = (
            "F helps"
            if found["flow"] < found["prior"]
            else "F does not help: train on more contexts"
        )
        print(
            f"held out, lambda {settings.highest_inverse_temperature:g}: KL(pi*||proposal of F) {found['flow']:.2f} nats, "
            f"of p {found['prior']:.2f}. {verdict}."
        )


def _train_live(settings: Any, output: Path, size: Any, resume: bool) -> None:
    """Train on a fleet; a mistake is told before Ray starts."""
    from sdt_dist.actors.live_training import check_live, train_live
    from sdt_dist.cluster.bars import progress_bar
    from sdt_dist.cluster.connect import attached
    from sdt_dist.cluster.live import fleet_line

    check_live(settings, output, size, resume=resume)
    bar = progress_bar()
    task = bar.add_task("starting", total=settings.steps)

    def watch(status: dict[str, Any]) -> None:
        learner = status["slots"]["learner-0"]
        words = f"version {learner.get('version', 0)}, {learner.get('received', 0)} samples from {status['done']} searches"
        bar.update(task, completed=learner.get("step", 0), description=words)
        line = fleet_line(status, {})
        if status["deaths"] and line != seen.get("line"):
            seen["line"] = line
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    seen: dict[str, str] = {}
    with bar, attached(size, bar.console.print):
        trained = train_live(settings, output, size, resume=resume, watch=watch)
    _finish(trained, output)


def _finish(trained: Any, output: Path) -> None:
    shown = {name: f"{value:.4g}" for name, value in trained.metrics.items() if name in _SHOWN}
    print(
        f"flow: {output} (version {trained.version}, {trained.step} steps; {shown}); curves.png and card.json beside it"
    )


_FLEET = ("live", "address", "servers", "searchers", "fleet")
_SHOWN = ("loss/total", "log_z", "calibration/tree_rms_error", "calibration/tree_correlation")
