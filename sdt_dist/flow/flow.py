"""A trained flow as searches and model servers use it: lambda F of all children of many states at once.

See docs/concepts/flow.md.

States of the network are cached per (prompt, inverse temperature, prefix), so that a child costs one step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sdt_dist.errors import ConfigurationError
from sdt_dist.flow.checkpoint import network_of, weights_digest
from sdt_dist.flow.files import FlowFiles
from sdt_dist.flow.info import (
    FlowHead,
    FlowInfo,
    check_inverse_temperature,
    check_model,
    check_reward,
)
from sdt_dist.flow.network import FlowNetwork
from sdt_dist.models.card import ModelCard
from sdt_dist.protocols import Root, State

_Name = tuple[bytes, float, tuple[int, ...]]
# rows are padded to multiples, because smaller products take other code paths in the BLAS
_ROWS = 8
# columns of a product; in narrower ones a row's bits depend on its place among the rows
_NARROWEST = 16
# rows of one product: in larger ones vectorised functions take a row's values in other groups, and change its last bits
_MOST_ROWS = 16
_ROOT: tuple[int, ...] = ()


class Flow:
    """F of one checkpoint, whose weights must not change any more. Not thread-safe: give each thread its own.

    With one torch thread on the CPU, and a hidden_size and key_size of at least 16, a state's bits do not depend on the
    states asked for with it, on their order, or on what is cached: every state is computed from its parent by one step, in
    rows padded to multiples of 8. Between machines and between thread counts only closeness is promised. `cache_bytes`
    bounds what is kept; the least recently used go.
    """

    def __init__(self, network: FlowNetwork, info: FlowInfo, cache_bytes: int = 64 << 20) -> None:
        self.network = network.eval()
        self.info = info
        self.spec = network.spec
        self.identity = FlowHead(self.spec, info, weights_digest(network.state_dict())).identity
        with torch.inference_mode():
            self._keys = _padded(network.keys(), _NARROWEST)
            self._token_values = network.values_of(torch.arange(*self.spec.allowed)).double()
        self._sizes = [self.spec.num_layers * self.spec.hidden_size, network.context_size]
        self._most_states = max(1, cache_bytes // (4 * (sum(self._sizes) + network.hidden_size)))
        # trunk states, context, what the heads read
        self._states: OrderedDict[_Name, torch.Tensor] = OrderedDict()

    @classmethod
    def load(
        cls, path: str | Path, *, card: ModelCard | None = None, reward: str | None = None
    ) -> Flow:
        """The flow in a checkpoint directory, refused with CheckpointError unless it is whole and, where they are given,
        was trained for the model of `card` and the REWARD SPEC `reward`."""
        files = FlowFiles.read(path)
        head = files.head
        if card is not None:
            check_model(head.spec, head.info, card)
        if reward is not None:
            check_reward(head.info, reward)
        return cls.of(files)

    @classmethod
    def of(cls, files: FlowFiles) -> Flow:
        """The flow in a checkpoint's files; CheckpointError unless they are whole."""
        network, info, _ = network_of(files)
        return cls(network, info)

    def check(self, inverse_temperature: float) -> None:
        """ConfigurationError unless the flow was trained at this inverse temperature."""
        check_inverse_temperature(self.info, inverse_temperature)

    def log_tilts(
        self, states: Sequence[State], inverse_temperature: float, log_prob: np.ndarray
    ) -> np.ndarray:
        """lambda F(s.a) [B, V] float64 of states (root, generated tokens) for every token a; 0 outside the allowed range.

        log_prob [B, V]: the states' rows of p, on which F(s.a) may depend. ConfigurationError for an inverse temperature
        outside the trained range, for states that are finished by length, and for tokens that the vocabulary does not have.
        """
        tops = self._tops(states, inverse_temperature, self.spec.max_new_tokens - 1)
        tilts = np.zeros((len(states), self.spec.vocab_size))
        low, high = self.spec.allowed
        for begin in range(0, len(states), _MOST_ROWS):
            chunk = slice(begin, begin + _MOST_ROWS)
            rows = tops[chunk]
            of_p = log_prob[chunk, low:high]
            with torch.inference_mode():
                values = self.network.token_values(_padded(rows), self._moments(of_p), self._keys)
            values = values[: len(rows), : high - low].double().numpy()
            tilts[chunk, low:high] = inverse_temperature * values
        return tilts

    def _moments(self, log_prob: np.ndarray) -> torch.Tensor:
        """What heads are told of rows [B, V'] of p (`FlowNetwork.moments`), padded to whole rows."""
        log_weight = torch.from_numpy(np.ascontiguousarray(log_prob))
        return _padded(self.network.moments(log_weight, self._token_values).float())

    def values(self, states: Sequence[State], inverse_temperature: float) -> np.ndarray:
        """F(s) [B] float64 of states, the root's included; of a finished state it is the network's guess of r.

        Errors as for `log_tilts`, but for states that are finished by length.
        """
        tops = self._tops(states, inverse_temperature, self.spec.max_new_tokens)
        found = []
        for begin in range(0, len(states), _MOST_ROWS):
            rows = tops[begin : begin + _MOST_ROWS]
            with torch.inference_mode():
                values = self.network.state_values(_padded(rows))
            found.append(values[: len(rows)].double().numpy())
        return np.concatenate([np.zeros(0), *found])

    def release(self, root: Root) -> None:
        """Forget what is cached for a problem."""
        names = [name for name in self._states if name[0] == root.digest]
        for name in names:
            del self._states[name]

    def forget(self) -> None:
        """Forget what is cached for all problems: a backend holds its flows for good, their caches need not stay."""
        self._states.clear()

    def _tops(
        self, states: Sequence[State], inverse_temperature: float, most_tokens: int
    ) -> torch.Tensor:
        """What the heads read [B, D]."""
        self.check(inverse_temperature)
        for _, tokens in states:
            self._check_state(tokens, most_tokens)
        names = [(root.digest, inverse_temperature, tuple(tokens)) for root, tokens in states]
        roots = {root.digest: root for root, _ in states}
        found = self._find(names, roots)
        first = sum(self._sizes)
        tops = [found[name][first:] for name in names]
        self._remember(found)
        if not tops:
            return torch.zeros(0, self.network.hidden_size)
        return torch.stack(tops)

    def _find(self, names: Sequence[_Name], roots: dict[bytes, Root]) -> dict[_Name, torch.Tensor]:
        """States of the names, and of all their prefixes that had to be computed, parents first."""
        found, levels = self._missing(names)
        for depth in sorted(levels):
            missing = list(levels[depth])
            for begin in range(0, len(missing), _MOST_ROWS):
                rows = missing[begin : begin + _MOST_ROWS]
                with torch.inference_mode():
                    states = self._start(rows, roots) if depth == 0 else self._step(rows, found)
                found |= zip(rows, states, strict=True)
        return found

    def _missing(
        self, names: Sequence[_Name]
    ) -> tuple[dict[_Name, torch.Tensor], dict[int, dict[_Name, None]]]:
        """(states that are cached, names to compute by their number of tokens, in order) of names and their prefixes."""
        found: dict[_Name, torch.Tensor] = {}
        levels: dict[int, dict[_Name, None]] = {}
        for name in names:
            while name not in found and name not in levels.get(len(name[2]), ()):
                state = self._states.get(name)
                if state is not None:
                    found[name] = state
                    break
                levels.setdefault(len(name[2]), {})[name] = None
                if name[2] == _ROOT:
                    break
                name = _parent(name)
        return found, levels

    def _start(self, names: Sequence[_Name], roots: dict[bytes, Root]) -> list[torch.Tensor]:
        """States of roots, each computed on its own row of the prompt's last tokens."""
        length = self.spec.context_length
        num_rows = _round_up(len(names))
        prompts = np.zeros((num_rows, length), dtype=np.int64)
        lengths = [1] * num_rows
        for i, (digest, _, _) in enumerate(names):
            recent = roots[digest].prompt[-length:]
            self._check_ids(recent)
            if not recent:
                raise ConfigurationError("flow: an empty prompt, allowed: at least one token.")
            prompts[i, : len(recent)] = recent
            lengths[i] = len(recent)
        tilt = torch.full((num_rows,), names[0][1])
        context = self.network.context(torch.from_numpy(prompts), torch.tensor(lengths), tilt)
        return self._advance(names, self.network.initial(context), context)

    def _step(self, names: Sequence[_Name], found: dict[_Name, torch.Tensor]) -> list[torch.Tensor]:
        """States of prefixes whose parents are found."""
        parents = torch.stack([found[_parent(name)] for name in names])
        sizes = [*self._sizes, self.network.hidden_size]
        states, context, _ = _padded(parents).split(sizes, dim=1)
        layers = states.unflatten(1, (self.spec.num_layers, -1))
        states = layers.transpose(0, 1).contiguous()
        return self._advance(names, states, context.contiguous())

    def _advance(
        self, names: Sequence[_Name], states: torch.Tensor, context: torch.Tensor
    ) -> list[torch.Tensor]:
        """What is kept of each state, from the trunk states of their parents and their contexts, padded to whole rows."""
        tokens = np.full((len(context), self.spec.max_new_tokens), self.spec.allowed[0])
        lengths = np.zeros(len(context), dtype=np.int64)
        for i, (_, _, prefix) in enumerate(names):
            tokens[i, : len(prefix)] = prefix
            lengths[i] = len(prefix)
        read, states = self.network.step(
            torch.from_numpy(tokens), torch.from_numpy(lengths), context, states
        )
        layers = states.transpose(0, 1).flatten(1)
        kept = torch.cat([layers, context, read], dim=1)
        return list(kept[: len(names)])

    def _remember(self, found: dict[_Name, torch.Tensor]) -> None:
        for name, state in found.items():
            if name not in self._states:
                self._states[name] = state.clone()  # not a view of its whole batch
            self._states.move_to_end(name)
        while len(self._states) > self._most_states:
            self._states.popitem(last=False)

    def _check_state(self, tokens: Sequence[int], most_tokens: int) -> None:
        if len(tokens) > most_tokens:
            raise ConfigurationError(
                f"flow: a state of {len(tokens)} tokens, allowed: up to {most_tokens}; its max_new_tokens is "
                f"{self.spec.max_new_tokens}."
            )
        self._check_ids(tokens)

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.spec.vocab_size:
            raise ConfigurationError(
                f"flow: token ids {min(tokens)} to {max(tokens)}, allowed: 0 to {self.spec.vocab_size - 1}."
            )


def _parent(name: _Name) -> _Name:
    """The state one token before."""
    digest, inverse_temperature, tokens = name
    return digest, inverse_temperature, tokens[:-1]


def _round_up(count: int) -> int:
    return -(-count // _ROWS) * _ROWS


def _padded(rows: torch.Tensor, least: int = _ROWS) -> torch.Tensor:
    """Rows [B, H] with zeros up to a multiple of 8, `least` of them at least."""
    num_rows = max(least, _round_up(len(rows)))
    missing = num_rows - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing))
