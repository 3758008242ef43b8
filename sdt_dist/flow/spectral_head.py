"""The flow network for tokens with values: F(s.a) from the spectrum that a sample will have in the end.

The head itself is `spectral.SpectralHead`; here it is put on the trunk. Of a prompt the log reference spectrum and
features of lambda are kept beside the summary, of a state the sample's Welch coefficients so far. See
docs/concepts/flow.md. It must not know searches, trajectories or files.
"""

from __future__ import annotations

import torch

from sdt_dist.flow.features import TILT_FEATURES, moments, reference_power
from sdt_dist.flow.layers import mlp
from sdt_dist.flow.network import FlowNetwork
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.flow.spectral import SpectralHead

_VALUE_FEATURES = 3


class SpectralNetwork(FlowNetwork):
    """Trunk and spectral head, for a spec with values."""

    def __init__(self, spec: FlowSpec) -> None:
        assert spec.values is not None
        super().__init__(spec)
        size = spec.hidden_size
        self.first_value = spec.values[0]
        self.spectral = SpectralHead(spec)
        self.known_size = self.spectral.known_size
        self.packed_size = self.spectral.packed_size
        seen = self.spectral.feature_size
        self._add_trunk(
            token_size=1,
            noted_size=self.spectral.num_frequencies,
            entering_size=_VALUE_FEATURES + seen,
        )
        self.state_head = mlp(2 * size + seen + TILT_FEATURES, size, 1)

    def state_values(self, hidden: torch.Tensor) -> torch.Tensor:
        states, packed = self._split(hidden)
        seen = self.spectral.features(packed)
        tilt = self.spectral.tilt_features(packed)
        inputs = torch.cat([states.detach(), seen, tilt], dim=-1)
        return self._scaled(self.state_head(inputs)[..., 0])

    def token_values(
        self, hidden: torch.Tensor, of_p: torch.Tensor, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        keys = self.keys() if keys is None else keys
        values = keys[:, 0].expand(*hidden.shape[:-1], -1)
        return self._values(hidden, of_p, values)

    def candidate_values(
        self, hidden: torch.Tensor, tokens: torch.Tensor, of_p: torch.Tensor
    ) -> torch.Tensor:
        return self._values(hidden, of_p, self.values_of(tokens))

    def path_loss(
        self, hidden: torch.Tensor, tokens: torch.Tensor, of_p: torch.Tensor
    ) -> torch.Tensor:
        """See `SpectralHead.path_loss`."""
        states, packed = self._split(hidden)
        return self.spectral.path_loss(states[:, :-1], packed, of_p, self.values_of(tokens))

    def keys(self) -> torch.Tensor:
        """Values [V', 1] of the allowed tokens."""
        tokens = torch.arange(*self.spec.allowed, device=self.reward_mean.device)
        return self.values_of(tokens)[:, None]

    def moments(self, log_weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return moments(log_weight, values)

    def values_of(self, tokens: torch.Tensor) -> torch.Tensor:
        low, high = self.spec.allowed
        steps = (tokens - low).to(self.reward_mean.dtype)
        values = self.first_value + self.spec.step * steps
        is_value = (tokens >= low) & (tokens < high)
        return torch.where(is_value, values, torch.zeros_like(values))

    def _values(
        self, hidden: torch.Tensor, of_p: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """F(s.a) [..., K] for values [..., K]."""
        states, packed = self._split(hidden)
        return self._scaled(self.spectral(states, packed, of_p, values))

    def _prompt_features(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.values_of(tokens)[..., None]

    def _note(
        self,
        read: torch.Tensor,  # [B, H]
        tokens: torch.Tensor,  # [B, L]
        is_real: torch.Tensor,  # [B, L]
        tilt: torch.Tensor,  # [B, 2]
    ) -> torch.Tensor:
        values = self.values_of(tokens) * is_real
        # real values first, as `reference_power` takes them; reversed time has the same power
        recent = values.flip(-1)
        log_power = reference_power(recent, is_real.sum(-1), self.spectral.basis).log()
        summary = self.summary(torch.cat([read, log_power / 3], dim=-1))
        return torch.cat([summary, log_power, tilt], dim=-1)

    def _pack_all(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.spectral.pack_all(self.values_of(tokens), self._known(context))

    def _pack(
        self, tokens: torch.Tensor, lengths: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        is_real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        values = self.values_of(tokens) * is_real
        return self.spectral.pack(values, lengths, self._known(context))

    def _token_features(self, tokens: torch.Tensor) -> torch.Tensor:
        values = self.values_of(tokens)
        features = [values, values**2 / 4, torch.log(values.abs() + 0.1)]
        return torch.stack(features, dim=-1)

    def _seen(self, packed: torch.Tensor) -> torch.Tensor:
        return self.spectral.features(packed)
