"""A bounded store of trajectories for training, sampled by how wrong the flow was about them.

See docs/concepts/flow.md.

Prioritised replay (Schaul et al. 2016, arXiv 1511.05952) without its importance weights: the flow's losses are zero at V
whatever the trajectories' distribution. It knows no torch; a learner packs it into its own checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.training.flow.trajectories import Trajectory, pack_trajectories, unpack_trajectories

Key = tuple[str, tuple[int, ...]]
_FLOOR = 1e-3  # so that what is learnt is still looked at


class ReplayBuffer:
    """At most `capacity` distinct trajectories, oldest first; (context, tokens) is what makes them distinct.

    A trajectory's priority is (last loss + 1e-3)^exponent; new ones get the largest loss there has been (at least 1). exponent 0: uniform.
    """

    def __init__(self, capacity: int, exponent: float = 0.5) -> None:
        if capacity < 1 or not 0 <= exponent <= 1:
            raise ConfigurationError(
                f"replay: capacity {capacity} and exponent {exponent}, allowed: at least 1, and from 0 to 1."
            )
        self.capacity = capacity
        self.exponent = exponent
        self._items: dict[Key, Trajectory] = {}  # in the order of their arrival
        self._groups: dict[
            str, dict[Key, float]
        ] = {}  # last losses by context, in the order of arrival
        self._totals: dict[
            str, float
        ] = {}  # sums of a context's priorities, where nothing has changed since
        self._largest = 1.0
        self.added = self.evicted = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def trajectories(self) -> list[Trajectory]:
        """All of them, oldest first."""
        return list(self._items.values())

    def add(self, trajectories: Sequence[Trajectory]) -> int:
        """Take trajectories in, the oldest going where room is needed; returns how many were not there before.

        One that was there takes the place, and the age, of its later record (which may have more candidates) and keeps
        its loss.
        """
        before = self.added
        for trajectory in trajectories:
            key = trajectory.key
            self.added += key not in self._items
            loss = self._drop(key) if key in self._items else self._largest
            self._put(trajectory, loss)
            if len(self._items) > self.capacity:
                self._drop(next(iter(self._items)))
                self.evicted += 1
        return self.added - before

    def sample(
        self, rng: np.random.Generator, num_contexts: int, per_context: int
    ) -> list[Trajectory]:
        """Up to `per_context` distinct trajectories of each of up to `num_contexts` distinct contexts.

        Contexts are drawn in proportion to the sum of their trajectories' priorities, then those by priority, both without
        replacement. ConfigurationError while the buffer is empty.
        """
        if not self._items:
            raise ConfigurationError("replay: empty; add trajectories before sampling.")
        contexts = sorted(self._groups)
        totals = np.array([self._total(context) for context in contexts])
        chosen: list[Trajectory] = []
        for i in _draw(rng, totals, num_contexts):
            group = self._groups[contexts[i]]
            keys = list(group)
            places = _draw(rng, self._priorities(group), per_context)
            chosen += [self._items[keys[j]] for j in places]
        return chosen

    def drop(self, is_unwanted: Callable[[Trajectory], bool]) -> int:
        """Take trajectories out; returns how many."""
        keys = [key for key, trajectory in self._items.items() if is_unwanted(trajectory)]
        for key in keys:
            self._drop(key)
        return len(keys)

    def update(self, trajectories: Sequence[Trajectory], losses: Sequence[float]) -> None:
        """Note the last losses (>= 0, finite) of trajectories; those that have gone meanwhile are ignored."""
        for trajectory, loss in zip(trajectories, losses, strict=True):
            if trajectory.key in self._items:
                self._groups[trajectory.context][trajectory.key] = float(loss)
                self._totals.pop(trajectory.context, None)
        self._largest = max(self._largest, *map(float, losses))

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(JSON-able header, arrays) from which `restore` makes an equal buffer."""
        heads, arrays = pack_trajectories(self.trajectories)
        losses = [self._groups[key[0]][key] for key in self._items]
        head = {
            "capacity": self.capacity,
            "exponent": self.exponent,
            "added": self.added,
            "evicted": self.evicted,
            "_largest": self._largest,
            "trajectories": heads,
        }
        return head, {**arrays, "losses": np.array(losses, dtype=np.float64)}

    @classmethod
    def restore(cls, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> ReplayBuffer:
        """The buffer that `state` described; CheckpointError for what it did not."""
        try:
            buffer = cls(head["capacity"], head["exponent"])
            trajectories = unpack_trajectories(head["trajectories"], arrays)
            for trajectory, loss in zip(trajectories, arrays["losses"].tolist(), strict=True):
                buffer._put(trajectory, loss)
            buffer.added = head["added"]
            buffer.evicted = head["evicted"]
            buffer._largest = head["_largest"]
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"replay: damaged ({error}); give a checkpoint saved by us."
            ) from error
        return buffer

    def _put(self, trajectory: Trajectory, loss: float) -> None:
        self._items[trajectory.key] = trajectory
        self._groups.setdefault(trajectory.context, {})[trajectory.key] = loss
        self._totals.pop(trajectory.context, None)

    def _drop(self, key: Key) -> float:
        """Take a trajectory out; returns its loss."""
        del self._items[key]
        loss = self._groups[key[0]].pop(key)
        self._totals.pop(key[0], None)
        if not self._groups[key[0]]:
            del self._groups[key[0]]
        return loss

    def _total(self, context: str) -> float:
        if context not in self._totals:
            priorities = self._priorities(self._groups[context])
            self._totals[context] = float(priorities.sum())
        return self._totals[context]

    def _priorities(self, group: dict[Key, float]) -> np.ndarray:
        losses = np.array(list(group.values()))
        return (losses + _FLOOR) ** self.exponent


def _draw(rng: np.random.Generator, weights: np.ndarray, count: int) -> list[int]:
    """Up to `count` distinct places in proportion to weights > 0, by the Gumbel-top-k rule."""
    perturbed = np.log(weights) + rng.gumbel(size=len(weights))
    return np.argsort(-perturbed, kind="stable")[:count].tolist()
