"""Small layers that the flow's networks share: perceptrons, features of a position, piecewise linear functions."""

from __future__ import annotations

import math

import torch
from torch import nn

NUM_POSITION_FEATURES = 6
_WAVES = (8,)  # half periods over a whole sample


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def position_features(position: torch.Tensor, most: int) -> torch.Tensor:
    """Features [..., 6] of positions 0..most: whether it is the root, how far it is, what is left, and waves."""
    is_root = position == 0
    share = position / most
    left = most - position
    waves = []
    for k in _WAVES:
        angle = math.pi * k * share
        waves += [torch.sin(angle), torch.cos(angle)]
    features = [
        is_root.to(share),
        share,
        1 / (1 + left.clamp(min=0)),
        1 / (1 + position),
        *waves,
    ]
    return torch.stack(features, dim=-1)


def interpolate(knots: torch.Tensor, places: torch.Tensor, reach: float) -> torch.Tensor:
    """The piecewise linear function with values knots [..., N], evenly spaced from -reach to reach, at places [..., K].

    Constant beyond the ends.
    """
    last = knots.shape[-1] - 1
    scaled = (places + reach) * (last / (2 * reach))
    scaled = scaled.clamp(0, last - 1e-3)
    below = scaled.floor()
    share = scaled - below
    index = below.long()
    return knots.gather(-1, index) * (1 - share) + knots.gather(-1, index + 1) * share
