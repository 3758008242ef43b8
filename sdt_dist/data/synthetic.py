"""Synthetic training series, generated in batches on any torch device.

See docs/guides/backends.md#bundled-forecaster.

Each series is a random mixture of: periodic profiles (daily, weekly on daily, random periods, amplitude and
day-to-day modulation), Gaussian processes of random smoothness and 1/f noise (sampled through their spectra),
quasi-periodic AR(2), trends and random walks, noises of several laws, level shifts and regime changes; then perhaps
made positive, intermittent, quantised, clipped, held or given outliers. No real series is involved.
"""

from __future__ import annotations

import math

import torch

Gen = torch.Generator
_DAILY_SHARE = 0.55


class Sampler:
    """Random tensors of a batch of B series on one device, from one generator."""

    def __init__(self, batch: int, length: int, generator: Gen) -> None:
        self.batch = batch
        self.length = length
        self.generator = generator
        self.device = generator.device
        self.time = torch.arange(length, device=self.device, dtype=torch.float32)[None]

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        size = (self.batch, *(shape or (1,)))
        return low + (high - low) * torch.rand(size, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(
            (self.batch, *(shape or (1,))), generator=self.generator, device=self.device
        )

    def log_uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def chance(self, probability: float) -> torch.Tensor:
        """[B, 1] booleans."""
        return self.uniform(0, 1) < probability

    def choice(self, values: list[float], weights: list[float]) -> torch.Tensor:
        """[B, 1] draws from a weighted list."""
        table = torch.tensor(values, device=self.device)
        index = torch.multinomial(
            torch.tensor(weights, device=self.device),
            self.batch,
            replacement=True,
            generator=self.generator,
        )
        return table[index][:, None]


def standardised(x: torch.Tensor) -> torch.Tensor:
    """Each series [B, L] with mean 0 and standard deviation 1."""
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)


def coloured_noise(s: Sampler) -> torch.Tensor:
    """Stationary Gaussian processes [B, L]: Matern of random scale and smoothness, or 1/f^beta, by FFT."""
    padded = 2 * s.length
    omega = 2 * math.pi * torch.fft.rfftfreq(padded, device=s.device)[None]
    scale = s.log_uniform(1.0, 600.0)
    smoothness = s.uniform(0.5, 4.0)
    matern = -(smoothness / 2 + 0.25) * torch.log1p((omega * scale) ** 2 / (2 * smoothness))
    power = -0.5 * s.uniform(0.0, 2.5) * torch.log(omega + 2 * math.pi / padded)
    log_filter = torch.where(s.chance(0.7), matern, power)
    spectrum = torch.fft.rfft(s.normal(padded)) * log_filter.exp()
    return standardised(torch.fft.irfft(spectrum, n=padded)[:, : s.length])


def quasi_periodic(s: Sampler) -> torch.Tensor:
    """AR(2) processes [B, L] with a spectral peak at a random period (cycles that drift in phase)."""
    padded = 2 * s.length
    omega = 2 * math.pi * torch.fft.rfftfreq(padded, device=s.device)[None]
    radius = s.uniform(0.85, 0.999)
    peak = 2 * math.pi / s.log_uniform(4.0, 200.0)
    z = torch.exp(-1j * omega)
    response = 1 / (1 - 2 * radius * torch.cos(peak) * z + radius**2 * z**2)
    return standardised(
        torch.fft.irfft(torch.fft.rfft(s.normal(padded)) * response, n=padded)[:, : s.length]
    )


def periods(s: Sampler) -> torch.Tensor:
    """[B, 1] periods: 24 most often, other calendar periods, and any length from 4 to 400."""
    calendar = s.choice(
        [24.0, 12.0, 7.0, 48.0, 96.0, 52.0, 168.0, 4.0, 30.0, 144.0],
        [10.0, 2.0, 1.5, 1.0, 1.0, 0.7, 0.5, 0.5, 0.5, 0.5],
    )
    anything = torch.where(
        s.chance(0.5), s.log_uniform(4.0, 400.0), s.log_uniform(4.0, 300.0).round()
    )
    period = torch.where(s.chance(0.65), calendar, anything)
    return torch.where(s.chance(_DAILY_SHARE), torch.full_like(period, 24.0), period)


def profile(s: Sampler, phase: torch.Tensor, harmonics: int = 10) -> torch.Tensor:
    """Random periodic functions of phase [B, L] in cycles: harmonics of random decay, perhaps made peaky."""
    order = torch.arange(1, harmonics + 1, device=s.device)[None].float()
    amplitude = s.normal(harmonics) * order ** (-s.uniform(0.3, 2.2))
    shift = s.uniform(0, 2 * math.pi, harmonics)
    angle = 2 * math.pi * phase[:, :, None] * order[:, None] + shift[:, None]
    wave = standardised((amplitude[:, None] * torch.cos(angle)).sum(-1))
    peaky = torch.exp(s.uniform(0.3, 1.5) * wave)
    plateau = torch.tanh(s.uniform(1.0, 4.0) * wave)
    kind = s.uniform(0, 1)
    return standardised(torch.where(kind < 0.6, wave, torch.where(kind < 0.85, peaky, plateau)))


def seasonal(s: Sampler) -> torch.Tensor:
    """Periodic profiles [B, L] with slowly and daily changing amplitude, level and phase, perhaps with a week."""
    period = periods(s)
    start = s.uniform(0, 1) * period
    phase = (s.time + start) / period
    wander = torch.where(s.chance(0.15), 0.05 * coloured_noise(s), torch.zeros_like(phase))
    wave = profile(s, phase + wander)
    modulation = torch.exp(s.uniform(0.0, 0.5) * s.chance(0.5) * coloured_noise(s))
    cycle = phase.floor().long() % 512
    by_cycle = torch.exp(s.uniform(0.0, 0.4) * s.chance(0.4) * s.normal(512)).gather(1, cycle)
    level = s.uniform(0.0, 0.8) * s.chance(0.4) * s.normal(512).gather(1, cycle)
    weekday = ((s.time + start) / period + 7 * s.uniform(0, 1)).floor().long() % 7
    week = s.normal(7)
    week_factor = 1 + s.uniform(0.0, 0.7) * s.chance(0.45) * torch.where(
        s.chance(0.5), week.gather(1, weekday), -(weekday >= 5).float()
    )
    week_level = s.uniform(0.0, 0.8) * s.chance(0.3) * week.gather(1, weekday)
    return wave * modulation * by_cycle * week_factor + level + week_level


def second_season(s: Sampler) -> torch.Tensor:
    """A further sinusoidal or profiled season [B, L] of independent period."""
    period = torch.where(
        s.chance(0.4), torch.full_like(s.uniform(0, 1), 168.0), s.log_uniform(4.0, 1500.0)
    )
    return profile(s, (s.time + s.uniform(0, 1) * period) / period, harmonics=4)


def trend(s: Sampler) -> torch.Tensor:
    """Linear, bent and exponential trends and random walks [B, L], each of unit spread."""
    x = s.time / s.length
    knot = s.uniform(0, 1)
    linear = s.normal() * x + s.chance(0.5) * s.normal() * torch.relu(x - knot)
    growth = torch.exp(s.uniform(-2.0, 2.0) * x)
    walk = torch.cumsum(s.normal(s.length), 1)
    kind = s.uniform(0, 1)
    return standardised(torch.where(kind < 0.4, linear, torch.where(kind < 0.55, growth, walk)))


def level_shifts(s: Sampler) -> torch.Tensor:
    """Piecewise constant levels [B, L] with up to four jumps."""
    jumps = torch.zeros(s.batch, s.length, device=s.device)
    where = (s.uniform(0, 1, 4) * s.length).long().clamp(max=s.length - 1)
    size = s.normal(4) * (s.uniform(0, 1, 4) < 0.4)
    return torch.cumsum(jumps.scatter_add(1, where, size), 1)


def noise(s: Sampler) -> torch.Tensor:
    """White noises [B, L]: Gaussian, Student, Laplace; perhaps of changing scale."""
    gauss = s.normal(s.length)
    chi = (s.normal(s.length) ** 2 + s.normal(s.length) ** 2 + s.normal(s.length) ** 2) / 3
    student = gauss / (chi + 0.05).sqrt()
    uniform = s.uniform(-0.499, 0.499, s.length)
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    kind = s.uniform(0, 1)
    white = torch.where(kind < 0.65, gauss, torch.where(kind < 0.85, student, laplace))
    return white * torch.exp(s.uniform(0.0, 0.8) * s.chance(0.3) * coloured_noise(s))


def mixture(s: Sampler) -> torch.Tensor:
    """Weighted sums of the components [B, L]; which dominate is itself random."""
    smooth = s.log_uniform(0.05, 2.0) * s.chance(0.6) * coloured_noise(s)
    season = s.log_uniform(0.3, 3.0) * s.chance(0.85) * seasonal(s)
    extra = s.log_uniform(0.05, 1.0) * s.chance(0.35) * second_season(s)
    drift = s.log_uniform(0.05, 2.5) * s.chance(0.5) * trend(s)
    cycle = s.log_uniform(0.1, 2.0) * s.chance(0.2) * quasi_periodic(s)
    shifts = s.log_uniform(0.1, 1.5) * s.chance(0.15) * level_shifts(s)
    white = s.log_uniform(0.005, 1.0) * noise(s)
    multiplied = season * torch.exp(0.5 * smooth)
    body = torch.where(s.chance(0.2), multiplied, season + smooth)
    return body + extra + drift + cycle + shifts + white


def deform(s: Sampler, x: torch.Tensor) -> torch.Tensor:
    """Perhaps make series positive, intermittent, quantised, clipped, held for a while, or give outliers."""
    z = standardised(x)
    z = torch.where(s.chance(0.12), torch.exp(s.uniform(0.2, 1.0) * z), z)
    floor = s.uniform(-1.0, 0.8)
    z = torch.where(s.chance(0.08), torch.maximum(z, floor), z)
    ceiling = s.uniform(-0.2, 1.5)
    z = torch.where(s.chance(0.04), torch.minimum(z, ceiling), z)
    step = s.log_uniform(0.02, 0.7)
    z = torch.where(s.chance(0.12), (z / step).round() * step, z)
    spikes = (
        s.normal(s.length)
        * s.log_uniform(1.0, 6.0)
        * (s.uniform(0, 1, s.length) < s.log_uniform(1e-3, 0.02))
    )
    z = z + s.chance(0.1) * spikes
    begin = s.uniform(0, 1) * s.length
    duration = s.log_uniform(3.0, 60.0)
    held = (s.time >= begin) & (s.time < begin + duration) & s.chance(0.05)
    value = z.gather(1, begin.long().clamp(max=s.length - 1))
    return torch.where(held, value.expand_as(z), z)


def generate(batch: int, length: int, generator: Gen) -> torch.Tensor:
    """Series [B, L] float32 on the generator's device, each roughly of unit spread; the same for the same seed."""
    s = Sampler(batch, length, generator)
    first = mixture(s)
    second = mixture(s)
    switch = s.uniform(0.1, 1.0) * s.length
    changed = torch.where((s.time > switch) & s.chance(0.05), second, first)
    x = deform(s, changed)
    return torch.nan_to_num(x, nan=0.0, posinf=50.0, neginf=-50.0) + 1e-3 * s.normal(length)
