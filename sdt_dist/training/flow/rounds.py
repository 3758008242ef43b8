"""What a round of a flow's training searches: with how many rollouts, at which inverse temperature, under which numbers.

A plan from (configuration, round) alone, for searches in this process and in a fleet. It knows no model and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sdt_dist.training.flow.config import TrainFlowConfig


@dataclass(frozen=True, slots=True)
class Part:
    """One of a round's two kinds of searches, each context once: from p, or with the newest flow.

    first: number of its first problem. Numbers never repeat in a training, so neither does the noise.
    """

    with_flow: bool
    first: int
    method: str
    options: dict[str, Any]


def parts_of(config: TrainFlowConfig, round_number: int, *, has_flow: bool) -> list[Part]:
    """A round's searches: all rollouts from p, or `flow_share` of them with the flow once there is one.

    Each part draws one lambda, log-uniformly over the trained range; what is learnt from does not depend on it.
    """
    with_flow = round(config.flow_share * config.rollouts) if has_flow else 0
    low = config.lowest_inverse_temperature
    high = config.highest_inverse_temperature
    found = []
    for number, rollouts in enumerate((config.rollouts - with_flow, with_flow)):
        if not rollouts:
            continue
        share = np.random.default_rng([config.seed, round_number, number]).random()
        tilt = float(np.clip(low * (high / low) ** share, low, high))
        options = config.search_options(
            with_flow=bool(number), rollouts=rollouts, inverse_temperature=tilt
        )
        method = config.flow_method if number else config.method
        found.append(
            Part(
                bool(number),
                (2 * round_number + number) * config.contexts_per_round,
                method,
                options,
            )
        )
    return found


def round_of(config: TrainFlowConfig, problem: int) -> int:
    """The round that a problem's number belongs to."""
    return problem // (2 * config.contexts_per_round)
