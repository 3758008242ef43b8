"""What the owner of a learner has done so far, saved with the learner's state and never apart from it.

On disk it is a JSON object. A training in one process has `rounds` and `held_out`; one that learns from a fleet also what
came from its buffer. These records grow as the training does; all else about a training is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sdt_dist.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Brought:
    """What one kind of searches brought to a round: counts, and means over its searches.

    new: trajectories that the buffer did not have. method None: from saved searches, of which only trajectories are
    counted. failed None: not counted, as in a fleet, where failed searches do not come. reward, ess None: not known.
    """

    trajectories: int
    new: int = 0
    method: str | None = None
    searches: int = 0
    failed: int | None = None
    reward: float | None = None
    ess: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As in card.json: what was not counted is left out."""
        if self.method is None:
            return {"trajectories": self.trajectories, "new": self.new}
        failed = {} if self.failed is None else {"failed": self.failed}
        return {
            "method": self.method,
            "trajectories": self.trajectories,
            "searches": self.searches,
            **failed,
            "reward": self.reward,
            "ess": self.ess,
            "new": self.new,
        }


@dataclass(slots=True)
class Tally:
    """Sums over the searches of one method in the round under way."""

    trajectories: int = 0
    searches: int = 0
    new: int = 0
    reward: float = 0.0
    ess: float = 0.0
    with_ess: int = 0

    def brought(self, method: str) -> Brought:
        """The sums, once the round is over."""
        return Brought(
            self.trajectories,
            self.new,
            method,
            self.searches,
            reward=self.reward / self.searches,
            ess=self.ess / self.with_ess if self.with_ess else None,
        )


@dataclass(slots=True)
class Intake:
    """What came from a fleet's buffer.

    token: the buffer's; held: numbers of its records that it may still have. received: finished samples; next_round: of the
    searches; tally: the round under way, by method.
    """

    token: str = ""
    held: list[int] = field(default_factory=list)
    received: int = 0
    searches: int = 0
    next_round: int = 0
    tally: dict[str, Tally] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that `of` reads."""
        return {
            "buffer": [self.token, self.held],
            "received": self.received,
            "searches": self.searches,
            "next_round": self.next_round,
            "tally": {method: asdict(sums) for method, sums in self.tally.items()},
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Intake:
        token, held = values["buffer"]
        tally = {method: Tally(**sums) for method, sums in values["tally"].items()}
        return cls(
            token,
            list(held),
            values["received"],
            values["searches"],
            values["next_round"],
            tally,
        )


@dataclass(slots=True)
class Progress:
    """rounds: what each brought, by kind of search; held_out: divergences of each version, in nats; intake: a fleet's."""

    rounds: list[list[Brought]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    intake: Intake | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `of` reads."""
        intake = {} if self.intake is None else self.intake.to_json()
        return {**intake, "rounds": self.rounds_json(), "held_out": self.held_out}

    def rounds_json(self) -> list[list[dict[str, Any]]]:
        """The rounds as JSON values."""
        return [[one.to_json() for one in brought] for brought in self.rounds]

    @classmethod
    def of(cls, values: Mapping[str, Any], owner: str) -> Progress:
        """The progress in a saved object; CheckpointError, naming its owner, for one that is not ours."""
        try:
            rounds = []
            for brought in values.get("rounds", []):
                rounds.append([Brought(**one) for one in brought])
            intake = Intake.of(values) if "buffer" in values else None
            return cls(rounds, list(values.get("held_out", [])), intake)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{owner}: no progress of a training ({error}); give a directory that we saved."
            ) from error
