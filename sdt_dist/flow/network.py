"""The flow network F(s) ~ V(s): a small causal network over prompt, generated tokens and inverse temperature.

    context  = MLP of [GRU over the prompt's last tokens; log lambda, or the log power spectrum of the tokens' values]
    h_t      = GRU over MLPs of [token, spectral features, position, context], with the context beside it
    F(s_t)   = state head(h_t)
    F(s_t.a) = the token head's (`token_head`) or, for tokens with values, the spectral head's (`spectral_head`)

for all a at once (docs/concepts/flow.md). Here is the trunk; `heads` chooses what is on it. What heads read is one vector
a state, so that states can be cached. It must not know searches, trajectories or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from sdt_dist.flow.layers import NUM_POSITION_FEATURES, mlp, position_features
from sdt_dist.flow.spec import FlowSpec


class FlowNetwork(nn.Module, ABC):
    """F for a spec, without a head. Values are in units of the reward; `set_scale` says where rewards lie.

    Weights are saved under the names of the attributes here, and optimiser states in their order: both stay.
    """

    reward_mean: torch.Tensor
    reward_scale: torch.Tensor
    known_size: int  # C, what a head keeps of a prompt beside the summary
    packed_size: int  # P, what a head keeps of a state beside the trunk's output and the summary

    def __init__(self, spec: FlowSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_scale", torch.ones(()))

    def _add_trunk(self, token_size: int, noted_size: int, entering_size: int) -> None:
        """The trunk's layers, for features of one prompt token, of a whole prompt and of one generated token."""
        spec = self.spec
        size = spec.hidden_size
        self.read = nn.Linear((token_size + 1) * spec.patch, size)
        self.reader = nn.GRU(size, size, batch_first=True)
        self.summary = mlp(size + noted_size, size, size)
        self.start = nn.Linear(size, size * spec.num_layers)
        self.enter = mlp(entering_size + NUM_POSITION_FEATURES + size, size, size)
        self.trunk = nn.GRU(size, size, spec.num_layers, batch_first=True)

    @property
    def context_size(self) -> int:
        """H + C, width of what is kept of a prompt."""
        return self.spec.hidden_size + self.known_size

    @property
    def hidden_size(self) -> int:
        """D = 2H + P, width of what the heads read of a state."""
        return 2 * self.spec.hidden_size + self.packed_size

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
        # 1. The prompts' last tokens, padded on the left to whole patches.
        tokens, is_real = self._recent(prompts, lengths)
        features = self._prompt_features(tokens)
        is_token = torch.ones_like(features[..., :1])
        features = torch.cat([features, is_token], dim=-1) * is_real[..., None]
        # 2. A GRU over the patches.
        patch_size = features.shape[-1] * self.spec.patch
        patches = features.reshape(len(tokens), -1, patch_size)
        _, last = self.reader(self.read(patches).tanh())
        # 3. With lambda, and what a head notes of the prompt.
        tilt = self._tilt(inverse_temperature)
        return self._note(last[0], tokens, is_real, tilt)

    def initial(self, context: torch.Tensor) -> torch.Tensor:
        """Trunk states [num_layers, B, H] before the root's own step."""
        state = self.start(self._summary(context)).tanh()
        layers = state.reshape(-1, self.spec.num_layers, self.spec.hidden_size)
        return layers.transpose(0, 1).contiguous()

    def hidden(self, context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What the heads read [B, T+1, D] after 0..T of the tokens [B, T] int, T <= max_new_tokens, padded with any token."""
        num_states = tokens.shape[1] + 1
        position = torch.arange(num_states, device=tokens.device).expand(len(tokens), -1)
        last = torch.nn.functional.pad(tokens, (1, 0), value=self.spec.allowed[0])
        packed = self._pack_all(tokens, context)
        inputs = self._inputs(last, position, packed, context)
        outputs, _ = self.trunk(inputs, self.initial(context))
        return self._join(outputs, context, packed)

    def step(
        self,
        tokens: torch.Tensor,  # [B, max_new_tokens] int, padded on the right with any token
        lengths: torch.Tensor,  # [B], 0 for roots
        context: torch.Tensor,  # [B, context_size]
        states: torch.Tensor,  # [num_layers, B, H], the parents' trunk states
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the heads read [B, D], trunk states [num_layers, B, H]) of prefixes from their parents' trunk states."""
        packed = self._pack(tokens, lengths, context)[:, None]
        position = lengths[:, None]
        last = tokens.gather(1, (position - 1).clamp(min=0))
        last = torch.where(position > 0, last, torch.full_like(last, self.spec.allowed[0]))
        inputs = self._inputs(last, position, packed, context)
        outputs, states = self.trunk(inputs, states)
        return self._join(outputs, context, packed)[:, 0], states

    @abstractmethod
    def state_values(self, hidden: torch.Tensor) -> torch.Tensor:
        """F(s) [...] of what `hidden` gives [..., D]."""

    @abstractmethod
    def token_values(
        self, hidden: torch.Tensor, of_p: torch.Tensor, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """F(s.a) [..., V'] of what `hidden` gives [..., D], for every allowed token.

        of_p: `moments` of the rows of p; keys: what `keys()` gives, if known.
        """

    @abstractmethod
    def candidate_values(
        self, hidden: torch.Tensor, tokens: torch.Tensor, of_p: torch.Tensor
    ) -> torch.Tensor:
        """F(s.b) [..., K] of what `hidden` gives [..., D] for token ids [..., K] within the allowed range."""

    @abstractmethod
    def path_loss(
        self, hidden: torch.Tensor, tokens: torch.Tensor, of_p: torch.Tensor
    ) -> torch.Tensor | None:
        """Minus the log-likelihood [B, T] of what the samples' spectra became, or None where nothing predicts them."""

    @abstractmethod
    def keys(self) -> torch.Tensor:
        """What is known of the allowed tokens beforehand, a row each: [V', ...]."""

    @abstractmethod
    def moments(self, log_weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What heads are told of p: mean and standard deviation [..., 2] of values [..., K] under weights exp(log_weight).

        Width 0 where tokens have no values.
        """

    @abstractmethod
    def values_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values [...] of token ids, 0 where they have none."""

    @abstractmethod
    def _prompt_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features [B, L, E] of a prompt's tokens [B, L]."""

    @abstractmethod
    def _note(
        self,
        read: torch.Tensor,  # [B, H], the reader's last state
        tokens: torch.Tensor,  # [B, L], the prompts' last tokens
        is_real: torch.Tensor,  # [B, L], False before a prompt's first token
        tilt: torch.Tensor,  # [B, 2], features of lambda
    ) -> torch.Tensor:
        """What is kept of a prompt [B, context_size], its summary first."""

    @abstractmethod
    def _pack_all(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """What the head keeps of every prefix [B, T+1, P] of tokens [B, T]."""

    @abstractmethod
    def _pack(
        self, tokens: torch.Tensor, lengths: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        """What the head keeps [B, P] of the first `lengths` [B] of tokens [B, T]."""

    @abstractmethod
    def _token_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features [B, T, E'] of generated tokens [B, T]."""

    @abstractmethod
    def _seen(self, packed: torch.Tensor) -> torch.Tensor:
        """Features [B, T, E''] of what is packed [B, T, P]."""

    def _recent(
        self, prompts: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the last tokens [B, L'] of prompts [B, L], whether they are tokens), L' a multiple of `patch`."""
        spec = self.spec
        padded = -spec.context_length % spec.patch + spec.context_length
        place = torch.arange(padded, device=lengths.device)
        position = lengths[:, None] - padded + place
        first = lengths[:, None] - spec.context_length
        is_real = (position >= 0) & (position >= first)
        return prompts.gather(1, position.clamp(min=0)), is_real

    def _inputs(
        self,
        last: torch.Tensor,  # [B, T], the tokens before each state, any token for roots
        position: torch.Tensor,  # [B, T]
        packed: torch.Tensor,  # [B, T, P]
        context: torch.Tensor,  # [B, context_size]
    ) -> torch.Tensor:
        """Trunk inputs [B, T, H]; those of roots stand for "no token yet"."""
        features = self._token_features(last)
        features = features * (position > 0)[..., None]
        seen = self._seen(packed)
        where = position_features(position.to(features), self.spec.max_new_tokens)
        summary = self._summary(context)[:, None].expand(*features.shape[:2], -1)
        return self.enter(torch.cat([features, seen, where, summary], dim=-1))

    def _join(
        self, outputs: torch.Tensor, context: torch.Tensor, packed: torch.Tensor
    ) -> torch.Tensor:
        summary = self._summary(context)[:, None].expand_as(outputs)
        return torch.cat([outputs, summary, packed], dim=-1)

    def _split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(trunk output and summary [..., 2H], what the head packed [..., P])."""
        size = 2 * self.spec.hidden_size
        return hidden[..., :size], hidden[..., size:]

    def _summary(self, context: torch.Tensor) -> torch.Tensor:
        return context[..., : self.spec.hidden_size]

    def _known(self, context: torch.Tensor) -> torch.Tensor:
        """What the head keeps of a prompt [..., C]."""
        return context[..., self.spec.hidden_size :]

    def _tilt(self, inverse_temperature: torch.Tensor) -> torch.Tensor:
        """Features [B, 2] of t, lambda in units of the rewards' spread: its log, and t / (1 + t), as V - E r ~ t for small t."""
        t = inverse_temperature * self.reward_scale
        return torch.stack([torch.log(t), 4 * t / (1 + t) - 2], dim=-1)

    def _scaled(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs of a head [...] in units of the reward."""
        return self.reward_mean + self.reward_scale * outputs
