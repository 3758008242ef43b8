"""The labels of an ablation's points: what a method's points share, and which of them stand for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.rewards.options import write_number


def family(method: MethodConfig, *without: str) -> str:
    """What the points of one method share: its label without its place, or without its place in some parameters alone."""
    base = method.label.removesuffix(suffix(method.ablated))
    if not without:
        return base
    kept = {name: value for name, value in method.ablated.items() if name not in without}
    return base + suffix(kept)


def suffix(point: Mapping[str, int | float]) -> str:
    """What a label says of its place in an ablation; nothing where it has none."""
    if not point:
        return ""
    values = [f"{name}={write_number(value)}" for name, value in point.items()]
    return f"[{','.join(values)}]"


def middle(config: EvaluationConfig) -> Iterator[str]:
    """The labels of an evaluation without its ablation: each method once, at the middle of its values."""
    middles = {name: sorted(values)[len(values) // 2] for name, values in config.ablate.items()}
    for method in config.method_configs():
        if all(value == middles[name] for name, value in method.ablated.items()):
            yield method.label
