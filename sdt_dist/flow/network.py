"""The flow network F(s) ~ V(s): a small causal network over prompt, generated tokens and inverse temperature.

    context  = MLP of [GRU over the prompt's last tokens; log power spectrum of their values; log lambda]
    h_t      = GRU over MLPs of [token and value features, running spectrum, position, context], with the context beside
    F(s_t)   = state head(h_t),     F(s_t . a) = u(h_t) + q(h_t) . k_a     for all a at once (SPEC section 6)

Keys k_a are a linear map of smooth features of the token's value, or of its embedding where tokens have no values, so
that V up to 128k costs one matrix product. It must not know searches, trajectories or files.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sdt_dist.flow.features import (
    VALUE_FEATURES,
    log_power,
    num_frequencies,
    running_spectrum,
    running_windows,
    value_features,
)
from sdt_dist.flow.spec import FlowSpec

_POSITION_FEATURES, _TILT_FEATURES = 6, 2


class FlowNetwork(nn.Module):
    """F for a spec. Values are in units of the reward; `set_scale` says where rewards lie."""

    reward_mean: torch.Tensor
    reward_scale: torch.Tensor

    def __init__(self, spec: FlowSpec) -> None:
        super().__init__()
        self.spec = spec
        size, width = spec.hidden_size, spec.key_size
        token_size = VALUE_FEATURES + 1 if spec.values else width
        spectrum = 0 if spec.values is None else num_frequencies(spec.context_segment)
        running = 0 if spec.values is None else 3 * num_frequencies(spec.running_segment)
        self.embedding = None if spec.values else nn.Embedding(spec.vocab_size, width)
        self.read = nn.Linear((token_size + 1) * spec.patch, size)
        self.reader = nn.GRU(size, size, batch_first=True)
        self.summary = _mlp(size + spectrum + _TILT_FEATURES, size, size)
        self.start = nn.Linear(size, size * spec.num_layers)
        self._input_size = token_size + running
        self.enter = _mlp(self._input_size + _POSITION_FEATURES + size, size, size)
        self.trunk = nn.GRU(size, size, spec.num_layers, batch_first=True)
        self.state_head = _mlp(2 * size, size, 1)
        self.query = _mlp(2 * size, size, width + 1)
        self.key = nn.Linear(token_size, width, bias=False)
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_scale", torch.ones(()))

    def set_scale(self, mean: float, scale: float) -> None:
        """Let outputs start around rewards of this mean and standard deviation (> 0)."""
        self.reward_mean.fill_(mean)
        self.reward_scale.fill_(scale)

    def forward(
        self, prompts: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor, inverse_temperature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """F of all states along sequences, teacher-forced: (state [B, T+1], token [B, T+1, V']).

        prompts [B, L] int, padded on the right to any length, lengths [B]; tokens [B, T] int, T <= max_new_tokens, padded
        with any token; inverse_temperature [B]. token[b, t, a - low] is F of the state after t tokens and token a.
        """
        hidden = self.hidden(self.context(prompts, lengths, inverse_temperature), tokens)
        return self.state_values(hidden), self.token_values(hidden)

    def context(self, prompts: torch.Tensor, lengths: torch.Tensor, inverse_temperature: torch.Tensor) -> torch.Tensor:
        """What the network keeps of prompts and inverse temperatures: [B, H]; arguments as for `forward`."""
        spec = self.spec
        padded = -spec.context_length % spec.patch + spec.context_length
        position = lengths[:, None] - padded + torch.arange(padded, device=lengths.device)
        is_real = (position >= 0) & (position >= lengths[:, None] - spec.context_length)
        tokens = prompts.gather(1, position.clamp(min=0))
        features = torch.cat([self._tokens(tokens), torch.ones_like(is_real)[..., None]], dim=-1)
        features = features * is_real[..., None]
        _, last = self.reader(self.read(features.reshape(len(tokens), -1, features.shape[-1] * spec.patch)).tanh())
        parts = [last[0], self._tilt(inverse_temperature)]
        if spec.values is not None:
            recent = slice(padded - spec.context_length, None)
            has_value = is_real & self._is_allowed(tokens)
            values = (self._values(tokens) * has_value)[:, recent]
            parts.append(log_power(values, has_value[:, recent], spec.context_segment))
        return self.summary(torch.cat(parts, dim=-1))

    def initial(self, context: torch.Tensor) -> torch.Tensor:
        """Trunk states [num_layers, B, H] before the root's own step."""
        state = self.start(context).tanh().reshape(-1, self.spec.num_layers, self.spec.hidden_size)
        return state.transpose(0, 1).contiguous()

    def hidden(self, context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What the heads read [B, T+1, 2H]: trunk outputs after 0..T of the tokens [B, T], and the context [B, H]."""
        windows = running_windows(self._values(tokens), self.spec.running_segment)
        position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        inputs = torch.cat([self.root_inputs(context), self._inputs(tokens, windows, position, context)], dim=1)
        outputs = self.trunk(inputs, self.initial(context))[0]
        return torch.cat([outputs, context[:, None].expand_as(outputs)], dim=-1)

    def root_inputs(self, context: torch.Tensor) -> torch.Tensor:
        """The trunk's first inputs [B, 1, H], which stand for "no token yet"."""
        return self._enter(context.new_zeros(len(context), 1, self._input_size), context.new_zeros(1), context)

    def step_inputs(self, recent: torch.Tensor, position: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Inputs [B, 1, H] of one more step; recent [B, N] are the last tokens, -1 where there are none yet, N the running
        segment; position [B]: how many tokens there are."""
        windows = self._values(recent.clamp(min=0)) * (recent >= 0)
        return self._inputs(recent[:, -1:], windows[:, None], position[:, None], context)

    def state_values(self, hidden: torch.Tensor) -> torch.Tensor:
        """F(s) [...] of what `hidden` gives [..., 2H]."""
        return self.reward_mean + self.reward_scale * self.state_head(hidden)[..., 0]

    def token_values(self, hidden: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """F(s.a) [..., V'] of what `hidden` gives [..., 2H], for every allowed token; keys: what `keys()` gives, if known."""
        query = self.query(hidden)
        scores = query[..., :-1] @ (self.keys() if keys is None else keys).T / math.sqrt(self.spec.key_size)
        return self.reward_mean + self.reward_scale * (query[..., -1:] + scores)

    def candidate_values(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """F(s.b) [..., K] of what `hidden` gives [..., 2H] for token ids [..., K] within the allowed range."""
        low = self.spec.allowed[0]
        if tokens.shape[-1] * 4 >= self.spec.num_tokens:
            return self.token_values(hidden).gather(-1, tokens - low)
        query = self.query(hidden)
        scores = (self.keys()[tokens - low] @ query[..., :-1, None])[..., 0] / math.sqrt(self.spec.key_size)
        return self.reward_mean + self.reward_scale * (query[..., -1:] + scores)

    def keys(self) -> torch.Tensor:
        """Keys [V', key_size] of the allowed tokens."""
        return self.key(self._tokens(torch.arange(*self.spec.allowed, device=self.key.weight.device)))

    def _tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features [..., D] of token ids: their embedding, or those of their value (0 outside the allowed range)."""
        if self.embedding is not None:
            return self.embedding(tokens)
        assert self.spec.values is not None
        allowed = self._is_allowed(tokens)[..., None].to(self.key.weight.dtype)
        return torch.cat([value_features(self._values(tokens), self.spec.values) * allowed, 1 - allowed], dim=-1)

    def _values(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values [...] of token ids, 0 where they have none."""
        spec = self.spec
        if spec.values is None:
            return torch.zeros_like(tokens, dtype=self.key.weight.dtype)
        values = spec.values[0] + spec.step * (tokens - spec.allowed[0]).to(self.key.weight.dtype)
        return torch.where(self._is_allowed(tokens), values, torch.zeros_like(values))

    def _is_allowed(self, tokens: torch.Tensor) -> torch.Tensor:
        low, high = self.spec.allowed
        return (tokens >= low) & (tokens < high)

    def _tilt(self, inverse_temperature: torch.Tensor) -> torch.Tensor:
        """Features [B, 2] of t, lambda in units of the rewards' spread: its log, and t / (1 + t), as V - E r ~ t for small t."""
        t = inverse_temperature * self.reward_scale
        return torch.stack([torch.log(t), 4 * t / (1 + t) - 2], dim=-1)

    def _inputs(
        self, tokens: torch.Tensor, windows: torch.Tensor, position: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        """Trunk inputs [B, T, H] of tokens [B, T], their windows [B, T, N] and positions [T] or [B, T]."""
        features = self._tokens(tokens)
        if self.spec.values is not None:
            features = torch.cat([features, running_spectrum(windows)], dim=-1)
        return self._enter(features, position, context)

    def _enter(self, features: torch.Tensor, position: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        shape = features.shape[:2]
        where = _positions(position.to(features), self.spec.max_new_tokens).expand(*shape, -1)
        return self.enter(torch.cat([features, where, context[:, None].expand(*shape, -1)], dim=-1))


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _positions(position: torch.Tensor, most: int) -> torch.Tensor:
    """Features [..., 6] of positions 0..most: whether it is the root, how far it is, what is left, and waves."""
    share = position / most
    waves = [f(math.pi * k * share) for k in (2,) for f in (torch.sin, torch.cos)]
    left = 1 / (1 + (most - position).clamp(min=0))
    return torch.stack([(position == 0).to(share), share, left, 1 / (1 + position), *waves], dim=-1)
