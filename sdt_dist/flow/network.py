"""The flow network F(s) ~ V(s): a small causal network over prompt, generated tokens and inverse temperature.

    context  = MLP of [GRU over the prompt's last tokens; log lambda, or the log power spectrum of the tokens' values]
    h_t      = GRU over MLPs of [token, spectral features, position, context], with the context beside it
    F(s_t)   = state head(h_t)
    F(s_t.a) = u(h_t) + q(h_t) . k_a, k_a an embedding of a; for tokens with values what `SpectralHead` makes of h_t

for all a at once (docs/concepts/flow.md). What heads read is one vector a state, so that states can be cached.
It must not know searches, trajectories or files.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sdt_dist.flow.features import reference_power
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.flow.spectral import TILT_FEATURES, SpectralHead

_POSITION_FEATURES = 6
_VALUE_FEATURES = 3


class FlowNetwork(nn.Module):
    """F for a spec. Values are in units of the reward; `set_scale` says where rewards lie."""

    reward_mean: torch.Tensor
    reward_scale: torch.Tensor

    def __init__(self, spec: FlowSpec) -> None:
        super().__init__()
        self.spec = spec
        size = spec.hidden_size
        width = spec.key_size
        self.spectral = None if spec.values is None else SpectralHead(spec)
        self.embedding = None if spec.values is not None else nn.Embedding(spec.vocab_size, width)
        token_size = width if self.spectral is None else 1
        noted = TILT_FEATURES if self.spectral is None else self.spectral.num_frequencies
        seen = 0 if self.spectral is None else self.spectral.feature_size
        self.read = nn.Linear((token_size + 1) * spec.patch, size)
        self.reader = nn.GRU(size, size, batch_first=True)
        self.summary = _mlp(size + noted, size, size)
        self.start = nn.Linear(size, size * spec.num_layers)
        entering = (width if self.spectral is None else _VALUE_FEATURES) + seen
        self.enter = _mlp(entering + _POSITION_FEATURES + size, size, size)
        self.trunk = nn.GRU(size, size, spec.num_layers, batch_first=True)
        self.state_head = _mlp(
            2 * size + seen + (0 if self.spectral is None else TILT_FEATURES), size, 1
        )
        if self.spectral is None:
            self.query = _mlp(2 * size, size, width + 1)
            self.key = nn.Linear(width, width, bias=False)
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_scale", torch.ones(()))

    @property
    def context_size(self) -> int:
        """Width of what is kept of a prompt: a summary [H] and, for tokens with values, the log reference and lambda."""
        return self.spec.hidden_size + (0 if self.spectral is None else self.spectral.known_size)

    @property
    def hidden_size(self) -> int:
        """D, width of what the heads read of a state."""
        return 2 * self.spec.hidden_size + (
            0 if self.spectral is None else self.spectral.packed_size
        )

    def set_scale(self, mean: float, scale: float) -> None:
        """Let outputs start around rewards of this mean and standard deviation (> 0)."""
        self.reward_mean.fill_(mean)
        self.reward_scale.fill_(scale)

    def context(
        self, prompts: torch.Tensor, lengths: torch.Tensor, inverse_temperature: torch.Tensor
    ) -> torch.Tensor:
        """What the network keeps of prompts and inverse temperatures: [B, context_size].

        prompts [B, L] int, padded on the right to any length, lengths [B], inverse_temperature [B].
        """
        spec = self.spec
        padded = -spec.context_length % spec.patch + spec.context_length
        position = lengths[:, None] - padded + torch.arange(padded, device=lengths.device)
        is_real = (position >= 0) & (position >= lengths[:, None] - spec.context_length)
        tokens = prompts.gather(1, position.clamp(min=0))
        features = (
            self.values_of(tokens)[..., None] if self.embedding is None else self.embedding(tokens)
        )
        features = (
            torch.cat([features, torch.ones_like(features[..., :1])], dim=-1) * is_real[..., None]
        )
        _, last = self.reader(
            self.read(features.reshape(len(tokens), -1, features.shape[-1] * spec.patch)).tanh()
        )
        tilt = self._tilt(inverse_temperature)
        if self.spectral is None:
            return self.summary(torch.cat([last[0], tilt], dim=-1))
        # real values first; reversed time has the same power
        recent = (self.values_of(tokens) * is_real).flip(-1)
        power = reference_power(recent, is_real.sum(-1), self.spectral.basis)
        return torch.cat(
            [self.summary(torch.cat([last[0], power.log() / 3], dim=-1)), power.log(), tilt], dim=-1
        )

    def initial(self, context: torch.Tensor) -> torch.Tensor:
        """Trunk states [num_layers, B, H] before the root's own step."""
        state = self.start(self._summary(context)).tanh()
        return (
            state.reshape(-1, self.spec.num_layers, self.spec.hidden_size)
            .transpose(0, 1)
            .contiguous()
        )

    def hidden(self, context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What the heads read [B, T+1, D] after 0..T of the tokens [B, T] int, T <= max_new_tokens, padded with any token."""
        position = torch.arange(tokens.shape[1] + 1, device=tokens.device).expand(len(tokens), -1)
        last = torch.nn.functional.pad(tokens, (1, 0), value=self.spec.allowed[0])
        packed = None
        if self.spectral is not None:
            packed = self.spectral.pack_all(self.values_of(tokens), self._known(context))
        inputs = self._inputs(last, position, packed, context)
        return self._join(self.trunk(inputs, self.initial(context))[0], context, packed)

    def step(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        context: torch.Tensor,
        states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the heads read [B, D], trunk states [num_layers, B, H]) of prefixes from their parents' trunk states.

        tokens [B, max_new_tokens] int, padded on the right with any token; lengths [B], 0 for roots.
        """
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        packed = None
        if self.spectral is not None:
            packed = self.spectral.pack(
                self.values_of(tokens) * real, lengths, self._known(context)
            )[:, None]
        last = tokens.gather(1, (lengths - 1).clamp(min=0)[:, None])
        last = torch.where(lengths[:, None] > 0, last, torch.full_like(last, self.spec.allowed[0]))
        outputs, states = self.trunk(self._inputs(last, lengths[:, None], packed, context), states)
        return self._join(outputs, context, packed)[:, 0], states

    def state_values(self, hidden: torch.Tensor) -> torch.Tensor:
        """F(s) [...] of what `hidden` gives [..., D]."""
        states, packed = self._split(hidden)
        inputs = states
        if self.spectral is not None:
            seen = [self.spectral.features(packed), self.spectral.tilt_features(packed)]
            inputs = torch.cat([states.detach(), *seen], dim=-1)
        return self.reward_mean + self.reward_scale * self.state_head(inputs)[..., 0]

    def token_values(
        self, hidden: torch.Tensor, moments: torch.Tensor | None, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """F(s.a) [..., V'] of what `hidden` gives [..., D], for every allowed token.

        moments [..., 2]: mean and standard deviation of the next value under p(.|s), for tokens with values; keys: what
        `keys()` gives, if known.
        """
        keys = self.keys() if keys is None else keys
        if self.spectral is None:
            query = self.query(hidden)
            scores = query[..., :-1] @ keys.T / math.sqrt(self.spec.key_size)
            return self.reward_mean + self.reward_scale * (query[..., -1:] + scores)
        return self._by_spectrum(hidden, moments, keys[:, 0].expand(*hidden.shape[:-1], -1))

    def candidate_values(
        self, hidden: torch.Tensor, tokens: torch.Tensor, moments: torch.Tensor | None
    ) -> torch.Tensor:
        """F(s.b) [..., K] of what `hidden` gives [..., D] for token ids [..., K] within the allowed range."""
        low = self.spec.allowed[0]
        if self.spectral is not None:
            return self._by_spectrum(hidden, moments, self.values_of(tokens))
        if tokens.shape[-1] * 4 >= self.spec.num_tokens:
            return self.token_values(hidden, None).gather(-1, tokens - low)
        query = self.query(hidden)
        scores = (self.keys()[tokens - low] @ query[..., :-1, None])[..., 0] / math.sqrt(
            self.spec.key_size
        )
        return self.reward_mean + self.reward_scale * (query[..., -1:] + scores)

    def path_loss(
        self, hidden: torch.Tensor, tokens: torch.Tensor, moments: torch.Tensor
    ) -> torch.Tensor | None:
        """Minus the log-likelihood [B, T] of what the samples' spectra became (`SpectralHead.path_loss`), or None."""
        if self.spectral is None:
            return None
        states, packed = self._split(hidden)
        return self.spectral.path_loss(states[:, :-1], packed, moments, self.values_of(tokens))

    def keys(self) -> torch.Tensor:
        """What is known of the allowed tokens beforehand: keys [V', key_size], or their values [V', 1]."""
        tokens = torch.arange(*self.spec.allowed, device=self.reward_mean.device)
        return (
            self.values_of(tokens)[:, None]
            if self.embedding is None
            else self.key(self.embedding(tokens))
        )

    def _by_spectrum(
        self, hidden: torch.Tensor, moments: torch.Tensor | None, values: torch.Tensor
    ) -> torch.Tensor:
        assert self.spectral is not None and moments is not None
        states, packed = self._split(hidden)
        return self.reward_mean + self.reward_scale * self.spectral(states, packed, moments, values)

    def _split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(trunk output and summary [..., 2H], what the spectral head packed)."""
        size = 2 * self.spec.hidden_size
        return hidden[..., :size], hidden[..., size:]

    def _join(
        self, outputs: torch.Tensor, context: torch.Tensor, packed: torch.Tensor | None
    ) -> torch.Tensor:
        parts = [outputs, self._summary(context)[:, None].expand_as(outputs)]
        return torch.cat(parts if packed is None else [*parts, packed], dim=-1)

    def _summary(self, context: torch.Tensor) -> torch.Tensor:
        return context[..., : self.spec.hidden_size]

    def _known(self, context: torch.Tensor) -> torch.Tensor:
        """The log reference [..., F] and the features of lambda [..., 2]."""
        return context[..., self.spec.hidden_size :]

    def values_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values [...] of token ids, 0 where they have none."""
        spec = self.spec
        dtype = self.reward_mean.dtype
        if spec.values is None:
            return torch.zeros_like(tokens, dtype=dtype)
        low, high = spec.allowed
        values = spec.values[0] + spec.step * (tokens - low).to(dtype)
        return torch.where((tokens >= low) & (tokens < high), values, torch.zeros_like(values))

    def _tilt(self, inverse_temperature: torch.Tensor) -> torch.Tensor:
        """Features [B, 2] of t, lambda in units of the rewards' spread: its log, and t / (1 + t), as V - E r ~ t for small t."""
        t = inverse_temperature * self.reward_scale
        return torch.stack([torch.log(t), 4 * t / (1 + t) - 2], dim=-1)

    def _inputs(
        self,
        last: torch.Tensor,
        position: torch.Tensor,
        packed: torch.Tensor | None,
        context: torch.Tensor,
    ) -> torch.Tensor:
        """Trunk inputs [B, T, H] of last tokens [B, T] at positions [B, T]; those of roots stand for "no token yet"."""
        if self.spectral is None:
            assert self.embedding is not None
            features = self.embedding(last)
        else:
            assert packed is not None
            values = self.values_of(last)
            features = torch.stack([values, values**2 / 4, torch.log(values.abs() + 0.1)], dim=-1)
        features = features * (position > 0)[..., None]
        if self.spectral is not None and packed is not None:
            features = torch.cat([features, self.spectral.features(packed)], dim=-1)
        where = _positions(position.to(features), self.spec.max_new_tokens)
        summary = self._summary(context)[:, None].expand(*features.shape[:2], -1)
        return self.enter(torch.cat([features, where, summary], dim=-1))


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _positions(position: torch.Tensor, most: int) -> torch.Tensor:
    """Features [..., 6] of positions 0..most: whether it is the root, how far it is, what is left, and waves."""
    share = position / most
    waves = [f(math.pi * k * share) for k in (8,) for f in (torch.sin, torch.cos)]
    left = 1 / (1 + (most - position).clamp(min=0))
    return torch.stack([(position == 0).to(share), share, left, 1 / (1 + position), *waves], dim=-1)
