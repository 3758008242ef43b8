"""The token head for tokens with values: what one more value would do to the spectrum that a sample will have in the end.

From a state the head predicts every final Welch coefficient under p: a mean, its response to the next value, and a
variance (`path`, trained by likelihood on what samples did become). The tilt of a value is then a learned function of the
log power that it leads to, relative to the context's spectrum, plus a free function of how surprising it is under p:

    F(s.a) = c - sum_k g_k softabs( log( sum_j |Z_jk + (v_a - mu) D_jk|^2 + f_k ) - log S_k ) + knots((v_a - mu) / sigma)

mu and sigma are the moments of p(.|s), which is known wherever F is used: rows of p live there. Trunk and predictions are
trained by `path_loss` alone, on what samples are under p; lambda is an input of the tilt only. It must not know trunks.
"""

from __future__ import annotations

import torch
from torch import nn

from sdt_dist.flow.features import num_frequencies, num_segments, welch_basis
from sdt_dist.flow.spec import FlowSpec

TILT_FEATURES = 2
# the free function is linear between knots at -4 to 4 standard deviations
_NUM_KNOTS = 17
_REACH = 4.0
_TYPICAL_SPREAD = 0.3  # of the default spectral reward under p; others are measured in its units
_LEAST_SPREAD = 5e-3
_TINY = 1e-3


class SpectralHead(nn.Module):
    """See the module. Inputs are packed as `SpectralHead.pack` does, so that states can be cached as vectors."""

    basis: torch.Tensor  # [T, S, F, 2]
    # [T + 1, S, F]: share of a coefficient's expected power that is still to come
    left: torch.Tensor
    trapezoid: torch.Tensor  # [F]: weights of frequencies in an integral over [0, 1]

    def __init__(self, spec: FlowSpec) -> None:
        super().__init__()
        basis = torch.view_as_real(
            torch.from_numpy(welch_basis(spec.max_new_tokens, spec.running_segment))
        )
        power = (basis**2).sum(-1)
        gone = torch.cat([torch.zeros_like(power[:1]), power.cumsum(0)]) / power.sum(0).clamp(
            min=1e-30
        )
        weights = torch.ones(num_frequencies(spec.running_segment), dtype=torch.float64)
        weights[[0, -1]] *= 0.5
        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("left", (1 - gone).clamp(min=0).float(), persistent=False)
        self.register_buffer("trapezoid", (weights / weights.sum()).float(), persistent=False)
        self.num_coefficients = num_segments(spec.max_new_tokens, spec.running_segment) * len(
            weights
        )
        self.num_frequencies = len(weights)
        size = spec.hidden_size
        self.known_size = self.num_frequencies + TILT_FEATURES
        self.packed_size = 2 * self.num_coefficients + self.known_size + 1
        self.feature_size = 2 * self.num_coefficients + self.num_frequencies
        self.path = _mlp(2 * size + self.feature_size + 2, 2 * size, 5 * self.num_coefficients)
        self.tilt = _mlp(
            2 * size + self.feature_size + 2 + self.num_frequencies + TILT_FEATURES,
            size,
            2 * self.num_frequencies + 2 + _NUM_KNOTS,
        )
        for last in (self.path[-1], self.tilt[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def pack(
        self, values: torch.Tensor, position: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """[B, packed_size] of the values so far [B, T] (0 where there are none yet), how many [B], and what is known of the
        context: log S [F] and features of lambda [2], together [B, known_size]."""
        coefficients = values @ self.basis.flatten(1)
        return torch.cat([coefficients, known, position[:, None].to(values)], dim=-1)

    def pack_all(self, values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """[B, n+1, packed_size] of every prefix of values [B, n]."""
        count = values.shape[1]
        added = values[..., None] * self.basis.flatten(1)[:count]
        coefficients = torch.nn.functional.pad(added.cumsum(1), (0, 0, 1, 0))
        position = torch.arange(count + 1, device=values.device).to(values).expand(len(values), -1)
        return torch.cat(
            [coefficients, known[:, None].expand(-1, count + 1, -1), position[..., None]], dim=-1
        )

    def tilt_features(self, packed: torch.Tensor) -> torch.Tensor:
        """Features [..., 2] of lambda."""
        return packed[..., -1 - TILT_FEATURES : -1]

    def features(self, packed: torch.Tensor) -> torch.Tensor:
        """Smooth features [..., feature_size] of what is packed: coefficients and power in units of the reference."""
        scaled, position = self._scaled(packed)
        power = (scaled**2).sum((-1, -3)) + self.left[position].mean(-2)
        return torch.cat([torch.asinh(2 * scaled).flatten(-3), torch.log(power + 1e-2)], dim=-1)

    def forward(
        self,
        states: torch.Tensor,
        packed: torch.Tensor,
        moments: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """F(s.a) [..., K], in units of the reward's spread, of values v_a [..., K]; states [..., 2H] from the trunk,
        moments [..., 2] of p(.|s)."""
        mean, response, variance = self.predict(states, packed, moments)
        mean = mean.detach()
        response = response.detach()
        variance = variance.detach().sum(-2)
        constant, linear, square = (
            (a * b).sum((-1, -3)) for a, b in ((mean, mean), (mean, response), (response,) * 2)
        )
        known = [self.tilt_features(packed), torch.log(variance + _TINY) / 3]
        inputs = self._inputs(states.detach(), packed, moments, *known)
        gate, widen, shape, knots = self.tilt(inputs).split(
            [*[self.num_frequencies] * 2, 2, _NUM_KNOTS], dim=-1
        )
        centre = moments[..., :1]
        spread = moments[..., 1:].clamp(min=_LEAST_SPREAD)
        gap = values - centre
        step = gap[..., None]
        power = (
            constant[..., None, :]
            + 2 * step * linear[..., None, :]
            + step**2 * square[..., None, :]
        )
        log_power = torch.log(power.clamp(min=0) + (variance * widen.exp())[..., None, :] + _TINY)
        width = torch.nn.functional.softplus(shape[..., :1] - 1.5)[..., None]
        distance = torch.sqrt(log_power**2 + width**2) - width
        position = packed[..., -1:] + 1
        gate = (
            self.trapezoid
            * torch.exp(gate + 4 * (position / len(self.basis) - 1))
            / _TYPICAL_SPREAD
        )
        return (
            shape[..., 1:]
            - (gate[..., None, :] * distance).sum(-1)
            + _interpolate(knots, gap / spread)
        )

    def predict(
        self, states: torch.Tensor, packed: torch.Tensor, moments: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Final coefficients over the reference's amplitude, given the next value: (mean where it is mu [..., S, F, 2],
        response to its distance from mu [..., S, F, 2], variance [..., S, F])."""
        inputs = self._inputs(states, packed, moments)
        found = self.path(inputs).unflatten(-1, (5, *self.left.shape[1:])).movedim(-3, -1)
        scaled, position = self._scaled(packed)
        amplitude = torch.exp(0.5 * self._log_reference(packed))[..., None, :, None]
        next_value = self.basis[position.clamp(max=len(self.basis) - 1)] / amplitude
        left = self.left[(position + 1).clamp(max=len(self.basis))]
        reach = left.sqrt()[..., None]
        mean = scaled + moments[..., :1, None, None] * next_value + 0.5 * reach * found[..., :2]
        response = next_value + 0.3 * reach * found[..., 2:4] / amplitude
        variance = left * found[..., 4].exp().clamp(max=1e3) / left.shape[-2] + 1e-5
        return mean, response, variance

    def path_loss(
        self,
        states: torch.Tensor,
        packed: torch.Tensor,
        moments: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Minus the log-likelihood [B, T], per coefficient, of what samples with values [B, T] became; packed [B, T+1, ...]."""
        mean, response, variance = self.predict(states, packed[:, :-1], moments)
        final = self._scaled(packed[:, -1:])[0]
        gap = (values - moments[..., 0])[..., None, None, None]
        error = ((final - mean - gap * response) ** 2).sum(-1)
        position = packed[:, :-1, -1].long() + 1
        open_ = self.left[position] > 1e-4
        each = torch.where(
            open_, (error / variance + torch.log(variance)).clamp(max=50.0), torch.zeros_like(error)
        )
        return each.mean((-1, -2))

    def _scaled(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(coefficients over the reference's amplitude [..., S, F, 2], position [...])."""
        coefficients = packed[..., : 2 * self.num_coefficients].unflatten(-1, self.basis.shape[1:])
        amplitude = torch.exp(0.5 * self._log_reference(packed))
        return coefficients / amplitude[..., None, :, None], packed[..., -1].long()

    def _log_reference(self, packed: torch.Tensor) -> torch.Tensor:
        return packed[..., 2 * self.num_coefficients : -1 - TILT_FEATURES]

    def _inputs(
        self, states: torch.Tensor, packed: torch.Tensor, moments: torch.Tensor, *more: torch.Tensor
    ) -> torch.Tensor:
        row = [moments[..., :1] / 2, torch.log(moments[..., 1:].clamp(min=_LEAST_SPREAD))]
        return torch.cat([states, self.features(packed), *row, *more], dim=-1)


def _interpolate(knots: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The piecewise linear function with these values at knots [..., 17], at places [..., K], constant beyond the ends."""
    scaled = (places + _REACH) * ((_NUM_KNOTS - 1) / (2 * _REACH))
    scaled = scaled.clamp(0, _NUM_KNOTS - 1 - 1e-3)
    below = scaled.floor()
    share = scaled - below
    index = below.long()
    return knots.gather(-1, index) * (1 - share) + knots.gather(-1, index + 1) * share


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
