"""What a finished training says of itself: card.json (data, settings, curves) and curves.png, from its files alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sdt_dist.files import replace_file, write_text
from sdt_dist.training.flow.config import TrainFlowConfig
from sdt_dist.training.flow.learner import LOSSES_FILE, Learner
from sdt_dist.training.flow.loss_log import Line, read_losses
from sdt_dist.training.flow.progress import Brought

FORMAT = "sdt-flow-card/1"
CARD = "card.json"
CURVES = "curves.png"
LIKELIHOODS = ("loss/contrastive", "loss/path")  # which may be negative
_POINTS = 100  # of each curve in the card


def write_record(learner: Learner, config: TrainFlowConfig, data: str) -> None:
    """card.json and curves.png beside the flow. data: what it was trained on. ResultsError when the disk refuses."""
    lines = read_losses(learner.directory / LOSSES_FILE)
    curves = _curves(lines)
    network = learner.trainer.network
    card = {
        "format": FORMAT,
        "model": config.model,
        "model_identity": learner.info.model,
        "reward": config.reward,
        "inverse_temperatures": list(config.training().inverse_temperatures),
        "data": data,
        "repeatable_from_seed": "no: it was learnt live, while searches went on" if config.live else "yes, on one thread",
        "parameters": sum(p.numel() for p in network.parameters()),
        "spec": network.spec.to_dict(),
        "settings": config.model_dump(mode="json"),
        "steps": learner.step,
        "version": learner.version,
        "trajectories": {
            "added": learner.replay.added, "kept": len(learner.replay), "dropped": learner.dropped,
            "expired": learner.expired,
        },
        "rounds": learner.progress.rounds_json(),
        "held_out": learner.progress.held_out,
        "metrics": learner.metrics,
        "curves": curves,
    }  # fmt: skip
    write_text(learner.directory / CARD, json.dumps(card, indent=2) + "\n")
    _draw(learner, curves, config.reward)


def _curves(lines: list[Line]) -> dict[str, dict[str, list[float]]]:
    """{metric: {step, value}}: means over up to 100 equal stretches of the training."""
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    curves = {}
    for name in names:
        points = np.array([(line["step"], line[name]) for line in lines if name in line])
        parts = np.array_split(points, min(_POINTS, len(points)))
        steps, values = zip(*(part.mean(0).tolist() for part in parts), strict=True)
        curves[name] = {"step": list(steps), "value": list(values)}
    return curves


def _draw(learner: Learner, curves: dict[str, Any], reward: str) -> None:
    """Losses, log Z, F against the trees' soft values, and the searches' rewards by round."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    losses = [name for name in curves if name.startswith("loss/") and name != "loss/total"]
    panels = (
        ("squared losses (squared nats)", [name for name in losses if name not in LIKELIHOODS]),
        ("likelihoods (nats, lower is better)", [name for name in losses if name in LIKELIHOODS]),
        ("log Z, batch mean (nats)", [name for name in curves if name == "log_z"]),
        (
            "F against the trees' soft values",
            [name for name in curves if name.startswith("calibration/")],
        ),
    )
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for name in names:
            axis.plot(
                curves[name]["step"],
                curves[name]["value"],
                label=name.partition("/")[2] or name,
                lw=1.2,
            )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if names:
            axis.legend(fontsize=7)
        else:
            _say_none(axis)
    if panels[0][1]:
        axes[0, 0].set_yscale("log")
    _draw_rounds(axes[1, 1], learner.progress.rounds)
    _draw_held_out(axes[1, 2], learner.progress.held_out, learner.info.inverse_temperatures[1])
    figure.suptitle(f"flow for {reward}", fontsize=10)
    replace_file(
        learner.directory / CURVES, lambda path: figure.savefig(path, dpi=120, format="png")
    )


def _draw_held_out(axis: Any, found: list[dict[str, float]], inverse_temperature: float) -> None:
    for name, label in (("prior", "p"), ("flow", "proposal of F")):
        axis.plot(range(1, len(found) + 1), [one[name] for one in found], marker=".", label=label)
    axis.set(title=f"held out: KL(π*‖·) at λ = {inverse_temperature:g} (nats)", xlabel="version")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7) if found else _say_none(axis)


def _say_none(axis: Any) -> None:
    axis.text(0.5, 0.5, "none here", ha="center", transform=axis.transAxes, color="#777777")


def _draw_rounds(axis: Any, rounds: list[list[Brought]]) -> None:
    points: dict[str, list[tuple[int, float]]] = {}
    for number, brought in enumerate(rounds):
        for one in brought:
            if one.method is not None and one.reward is not None:
                points.setdefault(one.method, []).append((number, one.reward))
    for method, found in points.items():
        axis.plot(*zip(*found, strict=True), marker=".", label=method)
    axis.set(title="mean reward of a round's searches", xlabel="round")
    if points:
        axis.legend(fontsize=7)
