"""The flow network for tokens without values: each is an embedding, and F(s.a) is a product of query and key.

    F(s_t.a) = u(h_t) + q(h_t) . k_a / sqrt(key_size),   k_a a linear function of the embedding of a

See docs/concepts/flow.md. It must not know searches, trajectories or files.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sdt_dist.flow.features import TILT_FEATURES
from sdt_dist.flow.layers import mlp
from sdt_dist.flow.network import FlowNetwork
from sdt_dist.flow.spec import FlowSpec


class TokenNetwork(FlowNetwork):
    """Trunk and token head. Of a prompt only the summary is kept, of a state nothing beside the trunk's output."""

    known_size = 0
    packed_size = 0

    def __init__(self, spec: FlowSpec) -> None:
        super().__init__(spec)
        size = spec.hidden_size
        width = spec.key_size
        self.embedding = nn.Embedding(spec.vocab_size, width)
        self._add_trunk(token_size=width, noted_size=TILT_FEATURES, entering_size=width)
        self.state_head = mlp(2 * size, size, 1)
        self.query = mlp(2 * size, size, width + 1)
        self.key = nn.Linear(width, width, bias=False)

    def state_values(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._scaled(self.state_head(hidden)[..., 0])

    def token_values(
        self, hidden: torch.Tensor, of_p: torch.Tensor, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        keys = self.keys() if keys is None else keys
        query = self.query(hidden)
        scores = query[..., :-1] @ keys.T / math.sqrt(self.spec.key_size)
        return self._scaled(query[..., -1:] + scores)

    def candidate_values(
        self, hidden: torch.Tensor, tokens: torch.Tensor, of_p: torch.Tensor
    ) -> torch.Tensor:
        index = tokens - self.spec.allowed[0]
        if (
            tokens.shape[-1] * 4 >= self.spec.num_tokens
        ):  # then one product with all keys is quicker
            return self.token_values(hidden, of_p).gather(-1, index)
        query = self.query(hidden)
        products = self.keys()[index] @ query[..., :-1, None]
        scores = products[..., 0] / math.sqrt(self.spec.key_size)
        return self._scaled(query[..., -1:] + scores)

    def path_loss(
        self, hidden: torch.Tensor, tokens: torch.Tensor, of_p: torch.Tensor
    ) -> torch.Tensor | None:
        return None

    def keys(self) -> torch.Tensor:
        """Keys [V', key_size] of the allowed tokens."""
        tokens = torch.arange(*self.spec.allowed, device=self.reward_mean.device)
        return self.key(self.embedding(tokens))

    def moments(self, log_weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return log_weight[..., :0]

    def values_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tokens, dtype=self.reward_mean.dtype)

    def _prompt_features(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)

    def _note(
        self,
        read: torch.Tensor,  # [B, H]
        tokens: torch.Tensor,  # [B, L]
        is_real: torch.Tensor,  # [B, L]
        tilt: torch.Tensor,  # [B, 2]
    ) -> torch.Tensor:
        return self.summary(torch.cat([read, tilt], dim=-1))

    def _pack_all(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return context.new_zeros(len(tokens), tokens.shape[1] + 1, 0)

    def _pack(
        self, tokens: torch.Tensor, lengths: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        return context.new_zeros(len(tokens), 0)

    def _token_features(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)

    def _seen(self, packed: torch.Tensor) -> torch.Tensor:
        return packed
