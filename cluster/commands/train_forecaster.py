"""`sdt train-forecaster`: train a forecaster, or fine-tune the bundled one on a CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train_forecaster(
    output: Annotated[
        Path, typer.Option(help="directory of weights, spec and curve; a stopped run in it goes on")
    ],
    data: Annotated[
        Path | None, typer.Option(help="CSV to fine-tune on; default: synthetic series")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="'bundled' or a directory to start from; default: random")
    ] = None,
    end_row: Annotated[
        int | None, typer.Option(min=1, help="use rows before this one only")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="windows a step")] = 16,
    muon_lr: Annotated[float, typer.Option(help="peak learning rate of hidden matrices")] = 1e-3,
    adam_lr: Annotated[
        float, typer.Option(help="peak learning rate of embeddings and norms")
    ] = 5e-4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Train a forecaster on synthetic series, or fine-tune one on your own (rows before a cut-off).

    Examples:

      sdt train-forecaster --init bundled --data load.csv --end-row 8640 --output runs/load

      sdt forecast load.csv --model runs/load --horizon 96
    """
    from sdt_dist.cluster.bars import progress_bar
    from sdt_dist.training.forecaster.train import TrainConfig
    from sdt_dist.training.forecaster.train import train_forecaster as train

    config = TrainConfig(
        output=str(output), steps=steps, batch_size=batch_size, muon_lr=muon_lr, adam_lr=adam_lr, seed=seed,
        device=device, init=init, data=None if data is None else str(data), end_row=end_row, checkpoint_every=100,
    )  # fmt: skip
    bar = progress_bar()
    task = bar.add_task("training", total=steps)

    def on_step(step: int, _: float) -> None:
        bar.start()  # with the first step, so that a mistake is told without a bar
        bar.update(task, completed=step)

    try:
        train(config, on_step=on_step)
    finally:
        bar.stop()
    print(f"forecaster: {output} (use it as --model {output})")
