"""Training batches: token windows whose scale comes from a leading context of random length."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from sdt_dist.data.scale import MIN_HISTORY
from sdt_dist.data.synthetic import generate
from sdt_dist.errors import DataError
from sdt_dist.models.forecaster.spec import ForecasterSpec
from sdt_dist.models.forecaster.tokenizer import FIRST_BIN


class Source(Protocol):
    """Raw series [B, L] for a step; the same for the same generator seed."""

    def draw(self, batch: int, length: int, generator: torch.Generator) -> torch.Tensor: ...


class SyntheticSource:
    """Series from `synthetic.generate`."""

    def draw(self, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
        return generate(batch, length, generator)


class CsvSource:
    """Random windows of a CSV's numeric columns, rows [0, end_row) only, so that later rows stay unseen.

    DataError for a file that cannot be read, is no CSV, or lacks finite numbers.
    """

    def __init__(self, path: Path, end_row: int | None, device: torch.device) -> None:
        self._path = path
        try:
            table = pd.read_csv(path)
        except OSError as error:
            raise DataError(
                f"data: {path} cannot be read ({error.strerror or error}); give a CSV file."
            ) from error
        except (ValueError, pd.errors.ParserError) as error:
            raise DataError(f"data: {path} is not a CSV ({error}).") from error
        table = table.select_dtypes("number").iloc[:end_row]
        values = table.to_numpy(dtype=np.float64)
        if table.empty or not np.isfinite(values).all():
            last = len(table) if end_row is None else end_row
            raise DataError(
                f"data: {path} needs numeric columns of finite values in rows 0 to {last}."
            )
        self._values = torch.tensor(values.T, dtype=torch.float64, device=device)

    def check(self, length: int) -> None:
        """DataError when no window of `length` rows can be drawn."""
        rows = self._values.shape[1]
        if rows <= length:
            raise DataError(
                f"data: {self._path} has {rows} rows, allowed: more than the training window of {length}."
            )

    def draw(self, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
        self.check(length)
        channels, rows = self._values.shape
        device = self._values.device
        channel = torch.randint(channels, (batch,), generator=generator, device=device)
        start = torch.randint(rows - length, (batch,), generator=generator, device=device)
        index = start[:, None] + torch.arange(length, device=device)[None]
        return self._values[channel[:, None], index]


def token_batch(
    source: Source, spec: ForecasterSpec, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, L] and loss weights [B, L-1] of the next token.

    A random prefix (the full context in 7 of 10 series) sets mean and std, as a history does at inference; tokens
    within the first MIN_HISTORY positions are not scored.
    """
    series = source.draw(batch, spec.max_length, generator).double()
    device = series.device
    context = torch.randint(
        3 * MIN_HISTORY, spec.context_length, (batch, 1), generator=generator, device=device
    )
    full = torch.rand(batch, 1, generator=generator, device=device) < 0.7
    context = torch.where(full, torch.full_like(context, spec.context_length), context)
    inside = (torch.arange(spec.max_length, device=device)[None] < context).double()
    loc = (series * inside).sum(1, keepdim=True) / context
    scale = (((series - loc) ** 2 * inside).sum(1, keepdim=True) / context).sqrt()
    usable = scale > 1e-4 * series.std(1, keepdim=True)
    z = ((series - loc) / torch.where(usable, scale, torch.ones_like(scale))).clamp(
        -spec.limit, spec.limit
    )
    tokens = ((z + spec.limit) / spec.tokenizer.bin_width).round().long() + FIRST_BIN
    weights = usable.float().expand(-1, spec.max_length - 1).clone()
    weights[:, :MIN_HISTORY] = 0.0
    return tokens, weights
