"""Where a flow's training finds contexts to search: synthetic series, a dataset's past, prompts of a text file.

A round's contexts depend on (seed, round) alone, so that a training that was stopped sees the same ones again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sdt_dist.data.registry import load_series
from sdt_dist.data.scale import MIN_HISTORY
from sdt_dist.data.series import Series
from sdt_dist.errors import DataError
from sdt_dist.parts import Context, SeriesPart, TextPart


class ContextSource(Protocol):
    """Contexts by round; `description` is what a model card says of them."""

    @property
    def description(self) -> str: ...

    def draw(self, seed: int, round_number: int, count: int) -> list[Context]:
        """The contexts of a round, up to `count`."""
        ...


@dataclass(frozen=True, slots=True)
class SyntheticContexts:
    """Histories of `length` values from the forecaster's own generator, without end and without any real series."""

    length: int

    @property
    def description(self) -> str:
        return f"synthetic series of {self.length} values from the forecaster's generator"

    def draw(self, seed: int, round_number: int, count: int) -> list[Context]:
        import torch

        from sdt_dist.data.synthetic import generate

        number = int(np.random.SeedSequence([seed, round_number]).generate_state(1)[0])
        series = generate(count, self.length, torch.Generator().manual_seed(number))
        return [(SeriesPart(values),) for values in series.double().numpy()]


class DatasetContexts:
    """Windows of a dataset's training part, or of its rows before `end_row`: at most `length` values, all channels."""

    def __init__(self, dataset: str, length: int, end_row: int | None = None) -> None:
        self._name = dataset
        self._length = length
        self._end_row = end_row
        pasts = [
            (series.name, series.values[: _end_of_training(series)][:end_row])
            for series in load_series(dataset)
        ]
        self._pasts = [(name, past) for name, past in pasts if len(past) > MIN_HISTORY]
        if not self._pasts:
            raise DataError(
                f"dataset {dataset!r}: no channel has more than {MIN_HISTORY} rows to train on"
                f"{'' if end_row is None else f' before row {end_row}'}; give more rows."
            )

    @property
    def description(self) -> str:
        rows = (
            "training part"
            if self._end_row is None
            else f"training part before row {self._end_row}"
        )
        return f"windows of up to {self._length} values of {self._name}, {rows}"

    def draw(self, seed: int, round_number: int, count: int) -> list[Context]:
        rng = np.random.default_rng([seed, round_number])
        found: list[Context] = []
        for _ in range(count):
            _, past = self._pasts[rng.integers(len(self._pasts))]
            end = int(rng.integers(min(self._length, len(past)), len(past) + 1))
            values = past[max(0, end - self._length) : end].astype(np.float64)
            found.append((SeriesPart(values),))
        return found


class PromptContexts:
    """The lines of a text file, each a prompt; a round draws them without repetition."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"prompts: {path} cannot be read ({error}); give a text file, one prompt a line."
            ) from error
        self._prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not self._prompts:
            raise DataError(f"prompts: {path} has no prompt; give one a line.")

    @property
    def description(self) -> str:
        return f"{len(self._prompts)} prompts of {self._path.name}"

    def draw(self, seed: int, round_number: int, count: int) -> list[Context]:
        rng = np.random.default_rng([seed, round_number])
        chosen = rng.permutation(len(self._prompts))[:count]
        return [(TextPart(self._prompts[i]),) for i in chosen]


def _end_of_training(series: Series) -> int:
    """The first row that is no part of training: by the dataset's splits, else where the last quarter begins."""
    splits = series.splits
    if splits is None:
        return len(series.values) - len(series.values) // 4
    if "train" in splits:
        return splits["train"][1]
    return min(begin for begin, _ in splits.values())
