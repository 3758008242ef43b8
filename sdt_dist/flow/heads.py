"""Which head a flow's trunk has: the one place that chooses, once, when a network is made."""

from __future__ import annotations

from sdt_dist.flow.network import FlowNetwork
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.flow.spectral_head import SpectralNetwork
from sdt_dist.flow.token_head import TokenNetwork


def build_network(spec: FlowSpec) -> FlowNetwork:
    """A network with random weights: with a spectral head where tokens have values, otherwise with a token head."""
    if spec.values is not None:
        return SpectralNetwork(spec)
    return TokenNetwork(spec)
