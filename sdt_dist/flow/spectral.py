"""The spectral head: what one more value would do to the spectrum that a sample will have in the end.

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

from sdt_dist.flow.features import TILT_FEATURES, num_frequencies, num_segments, welch_basis
from sdt_dist.flow.layers import interpolate, mlp
from sdt_dist.flow.spec import FlowSpec

# the free function is linear between knots at -4 to 4 standard deviations
_NUM_KNOTS = 17
_REACH = 4.0
_TYPICAL_SPREAD = 0.3  # of the default spectral reward under p; others are measured in its units
_LEAST_SPREAD = 5e-3
_TINY = 1e-3
_MOMENTS = 2
_PREDICTED = 5  # of a coefficient: mean and response, real and imaginary, and log variance


class SpectralHead(nn.Module):
    """See the module. Inputs are packed as `SpectralHead.pack` does, so that states can be cached as vectors."""

    basis: torch.Tensor  # [T, S, F, 2]
    left: torch.Tensor  # [T + 1, S, F]: share of a coefficient's expected power that is to come
    trapezoid: torch.Tensor  # [F]: weights of frequencies in an integral over [0, 1]

    def __init__(self, spec: FlowSpec) -> None:
        super().__init__()
        self._add_tables(spec)
        num_segments_ = num_segments(spec.max_new_tokens, spec.running_segment)
        self.num_frequencies = num_frequencies(spec.running_segment)
        self.num_coefficients = num_segments_ * self.num_frequencies
        self.known_size = self.num_frequencies + TILT_FEATURES
        self.packed_size = 2 * self.num_coefficients + self.known_size + 1
        self.feature_size = 2 * self.num_coefficients + self.num_frequencies
        size = spec.hidden_size
        read = 2 * size + self.feature_size + _MOMENTS
        self.path = mlp(read, 2 * size, _PREDICTED * self.num_coefficients)
        self.tilt = mlp(
            read + self.num_frequencies + TILT_FEATURES,
            size,
            2 * self.num_frequencies + 2 + _NUM_KNOTS,
        )
        for last in (self.path[-1], self.tilt[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def _add_tables(self, spec: FlowSpec) -> None:
        """What follows from the spec alone, and is not saved."""
        welch = welch_basis(spec.max_new_tokens, spec.running_segment)
        basis = torch.view_as_real(torch.from_numpy(welch))
        power = (basis**2).sum(-1)
        total = power.sum(0).clamp(min=1e-30)
        so_far = torch.cat([torch.zeros_like(power[:1]), power.cumsum(0)])
        left = 1 - so_far / total
        weights = torch.ones(num_frequencies(spec.running_segment), dtype=torch.float64)
        weights[[0, -1]] *= 0.5
        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("left", left.clamp(min=0).float(), persistent=False)
        self.register_buffer("trapezoid", (weights / weights.sum()).float(), persistent=False)

    def pack(
        self, values: torch.Tensor, position: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """[B, packed_size] of the values so far [B, T] (0 where there are none yet), how many [B], and what is known of the
        context: log S [F] and features of lambda [2], together [B, known_size]."""
        coefficients = values @ self.basis.flatten(1)
        return torch.cat([coefficients, known, position[:, None].to(values)], dim=-1)

    def pack_all(self, values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """[B, n+1, packed_size] of every prefix of values [B, n]."""
        num_values = values.shape[1]
        added = values[..., None] * self.basis.flatten(1)[:num_values]
        coefficients = torch.nn.functional.pad(added.cumsum(1), (0, 0, 1, 0))
        known = known[:, None].expand(-1, num_values + 1, -1)
        position = torch.arange(num_values + 1, device=values.device).to(values)
        position = position.expand(len(values), -1)
        return torch.cat([coefficients, known, position[..., None]], dim=-1)

    def tilt_features(self, packed: torch.Tensor) -> torch.Tensor:
        """Features [..., 2] of lambda."""
        return packed[..., -1 - TILT_FEATURES : -1]

    def features(self, packed: torch.Tensor) -> torch.Tensor:
        """Smooth features [..., feature_size] of what is packed: coefficients and power in units of the reference."""
        scaled, position = self._scaled(packed)
        power = (scaled**2).sum((-1, -3)) + self.left[position].mean(-2)
        bounded = torch.asinh(2 * scaled).flatten(-3)
        return torch.cat([bounded, torch.log(power + 1e-2)], dim=-1)

    def forward(
        self,
        states: torch.Tensor,  # [..., 2H], from the trunk
        packed: torch.Tensor,  # [..., packed_size]
        moments: torch.Tensor,  # [..., 2], mu and sigma of p(.|s)
        values: torch.Tensor,  # v_a [..., K]
    ) -> torch.Tensor:
        """F(s.a) [..., K], in units of the reward's spread."""
        # 1. The final coefficients under p, as a function of the next value.
        mean, response, variance = self.predict(states, packed, moments)
        mean = mean.detach()
        response = response.detach()
        variance = variance.detach().sum(-2)
        # 2. sum_j |Z_j + (v - mu) D_j|^2 as a polynomial in v - mu.
        constant = _summed(mean, mean)
        linear = _summed(mean, response)
        square = _summed(response, response)
        # 3. The shape of the tilt in this state.
        tilt = self.tilt_features(packed)
        log_variance = torch.log(variance + _TINY) / 3
        inputs = self._inputs(states.detach(), packed, moments, tilt, log_variance)
        parts = [self.num_frequencies, self.num_frequencies, 2, _NUM_KNOTS]
        gate, widen, shape, knots = self.tilt(inputs).split(parts, dim=-1)
        # 4. Log power over the reference's, for each value.
        centre = moments[..., :1]
        spread = moments[..., 1:].clamp(min=_LEAST_SPREAD)
        gap = values - centre
        step = gap[..., None]
        crossed = 2 * step * linear[..., None, :]
        power = constant[..., None, :] + crossed + step**2 * square[..., None, :]
        floor = (variance * widen.exp())[..., None, :]
        log_power = torch.log(power.clamp(min=0) + floor + _TINY)
        # 5. Its soft absolute value, weighed over frequencies; what the sample still lacks counts less.
        width = torch.nn.functional.softplus(shape[..., :1] - 1.5)[..., None]
        distance = torch.sqrt(log_power**2 + width**2) - width
        position = packed[..., -1:] + 1
        late = 4 * (position / len(self.basis) - 1)
        gate = self.trapezoid * torch.exp(gate + late) / _TYPICAL_SPREAD
        lost = (gate[..., None, :] * distance).sum(-1)
        # 6. With the free function of the surprise.
        return shape[..., 1:] - lost + interpolate(knots, gap / spread, _REACH)

    def predict(
        self, states: torch.Tensor, packed: torch.Tensor, moments: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Final coefficients over the reference's amplitude, given the next value: (mean where it is mu [..., S, F, 2],
        response to its distance from mu [..., S, F, 2], variance [..., S, F])."""
        inputs = self._inputs(states, packed, moments)
        sizes = (_PREDICTED, *self.left.shape[1:])
        found = self.path(inputs).unflatten(-1, sizes).movedim(-3, -1)
        scaled, position = self._scaled(packed)
        amplitude = self._amplitude(packed)[..., None, :, None]
        # what a next value of 1 adds, and the share of power that comes after it
        next_value = self.basis[position.clamp(max=len(self.basis) - 1)] / amplitude
        left = self.left[(position + 1).clamp(max=len(self.basis))]
        reach = left.sqrt()[..., None]
        mu = moments[..., :1, None, None]
        mean = scaled + mu * next_value + 0.5 * reach * found[..., :2]
        response = next_value + 0.3 * reach * found[..., 2:4] / amplitude
        variance = left * found[..., 4].exp().clamp(max=1e3) / left.shape[-2] + 1e-5
        return mean, response, variance

    def path_loss(
        self,
        states: torch.Tensor,  # [B, T, 2H]
        packed: torch.Tensor,  # [B, T + 1, packed_size], the finished sample's last
        moments: torch.Tensor,  # [B, T, 2]
        values: torch.Tensor,  # [B, T]
    ) -> torch.Tensor:
        """Minus the log-likelihood [B, T], per coefficient, of what the samples became."""
        mean, response, variance = self.predict(states, packed[:, :-1], moments)
        final, _ = self._scaled(packed[:, -1:])
        gap = (values - moments[..., 0])[..., None, None, None]
        error = ((final - mean - gap * response) ** 2).sum(-1)
        position = packed[:, :-1, -1].long() + 1
        is_open = self.left[position] > 1e-4
        each = (error / variance + torch.log(variance)).clamp(max=50.0)
        each = torch.where(is_open, each, torch.zeros_like(error))
        return each.mean((-1, -2))

    def _scaled(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(coefficients over the reference's amplitude [..., S, F, 2], position [...])."""
        coefficients = packed[..., : 2 * self.num_coefficients].unflatten(-1, self.basis.shape[1:])
        amplitude = self._amplitude(packed)
        return coefficients / amplitude[..., None, :, None], packed[..., -1].long()

    def _amplitude(self, packed: torch.Tensor) -> torch.Tensor:
        """The reference's amplitude [..., F]."""
        log_reference = packed[..., 2 * self.num_coefficients : -1 - TILT_FEATURES]
        return torch.exp(0.5 * log_reference)

    def _inputs(
        self,
        states: torch.Tensor,  # [..., 2H]
        packed: torch.Tensor,  # [..., packed_size]
        moments: torch.Tensor,  # [..., 2]
        *more: torch.Tensor,  # [..., any]
    ) -> torch.Tensor:
        mu = moments[..., :1] / 2
        log_sigma = torch.log(moments[..., 1:].clamp(min=_LEAST_SPREAD))
        return torch.cat([states, self.features(packed), mu, log_sigma, *more], dim=-1)


def _summed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The products of coefficients [..., S, F, 2], summed over segments and parts: [..., F]."""
    return (a * b).sum((-1, -3))
