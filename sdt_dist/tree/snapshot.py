"""A finished search as arrays on disk: for drawing, for training, and for going on with more budget.

See docs/concepts/target.md#methods.

An .npz without pickled objects: the tree's fields, every finished sequence with its reward, what the method notes of
its walks, and a JSON header. Texts and series are decoded again when a search is resumed.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.files import replace_file
from sdt_dist.tree.tree import Tree

FORMAT = "sdt-search/1"
BUDGET_FIELDS = ("num_rollouts", "max_nfe", "time_budget_s", "num_samples")
Sequences = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a tree search needs to go on: `header` identifies it, `counters` hold what was paid so far.

    sequences [S]: finished token sequences, end token included, in the order they were found; rewards [S], log_probs
    [S] and components {name: [S]} belong to them. `blocks` names token blocks where nodes are blocks. `notes` are the
    method's own arrays (residual_ts: its tickets).
    """

    header: dict[str, Any]
    counters: dict[str, float]
    tree: Tree
    sequences: Sequences
    rewards: np.ndarray
    log_probs: np.ndarray
    components: dict[str, np.ndarray]
    blocks: Sequences = field(default_factory=list)
    notes: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write an .npz, whole or not at all. ResultsError when the disk refuses."""
        target = Path(path)
        head = {"format": FORMAT, "header": self.header, "counters": self.counters}
        arrays = {
            "head": np.array(json.dumps(head)),
            "rewards": self.rewards,
            "log_probs": self.log_probs,
            **_packed("sequences", self.sequences),
            **_packed("blocks", self.blocks),
            **{f"tree/{name}": value for name, value in self.tree.arrays().items()},
            **{f"components/{name}": value for name, value in self.components.items()},
            **{f"notes/{name}": value for name, value in self.notes.items()},
        }

        def write(path: Path) -> None:
            with path.open("wb") as handle:
                np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]

        replace_file(target, write)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """What `save` wrote. CheckpointError for a missing, damaged or foreign file; pickled objects are refused."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            head = json.loads(str(arrays["head"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"resume: {path} is no saved search ({error}); give a file that save() wrote."
            ) from error
        if head.get("format") != FORMAT:
            raise CheckpointError(
                f"resume: {path} has format {head.get('format')!r}, allowed: {FORMAT!r}."
            )
        return cls(
            head["header"],
            head["counters"],
            Tree.from_arrays(_group(arrays, "tree/")),
            _unpacked("sequences", arrays),
            arrays["rewards"],
            arrays["log_probs"],
            _group(arrays, "components/"),
            _unpacked("blocks", arrays),
            _group(arrays, "notes/"),
        )

    def check(self, header: dict[str, Any]) -> None:
        """Refuse to go on with another method, prompt, seed or setting; ConfigurationError names the difference."""
        for name, value in header.items():
            if name != "options" and self.header[name] != value:
                raise ConfigurationError(
                    f"resume: the saved search has {name} {self.header[name]!r}, now {value!r}."
                )
        for name, value in header["options"].items():
            before = self.header["options"].get(name)
            if name not in BUDGET_FIELDS and before != value:
                raise ConfigurationError(
                    f"resume: the saved search has {name}={before!r}, now {value!r}."
                )


def _packed(name: str, sequences: Sequences) -> dict[str, np.ndarray]:
    flat = np.array([token for sequence in sequences for token in sequence], dtype=np.int64)
    return {
        f"{name}/tokens": flat,
        f"{name}/lengths": np.array([len(s) for s in sequences], dtype=np.int64),
    }


def _unpacked(name: str, arrays: dict[str, np.ndarray]) -> Sequences:
    ends = np.cumsum(arrays[f"{name}/lengths"]).tolist()
    flat: Sequence[int] = arrays[f"{name}/tokens"].tolist()
    return [tuple(flat[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def _group(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
