"""One channel of a dataset, and reading such channels from a CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sdt_dist.errors import DataError, unknown_name


@dataclass(frozen=True, slots=True)
class Series:
    """values [N] of one channel. `splits` maps a split to the half-open range of rows its targets may use.

    (loc, scale) standardise it for metrics: by the training part where the dataset defines one, else None, and each
    problem uses its own history.
    """

    name: str
    values: np.ndarray
    season: int
    timestamps: pd.DatetimeIndex | None = None
    splits: dict[str, tuple[int, int]] | None = None
    loc: float | None = None
    scale: float | None = None


def read_csv(path: Path, *, column: str | None = None, time_column: str | None = None) -> pd.DataFrame:
    """Numeric columns of a CSV, indexed by its time column (the first datetime-like one) where there is one.

    DataError for a missing file or column, for text where numbers are wanted, and for NaN or infinity.
    """
    try:
        table = pd.read_csv(path)
    except FileNotFoundError as error:
        raise DataError(f"data: file {str(path)!r} does not exist.") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"data: {path} is not a CSV ({error}).") from error
    for name in (column, time_column):
        if name is not None and name not in table.columns:
            raise DataError(str(unknown_name("column", name, map(str, table.columns))))
    index = _time_index(table, time_column)
    numeric = table.drop(columns=[index.name] if index is not None else []).select_dtypes("number")
    if column is not None:
        if column not in numeric.columns:
            raise DataError(f"column {column!r}: not numeric; allowed: {', '.join(map(str, numeric.columns))}.")
        numeric = numeric.loc[:, [column]]
    if numeric.empty:
        raise DataError(f"data: {path} has no numeric column.")
    finite = np.isfinite(numeric.to_numpy(dtype=np.float64))
    if not finite.all():
        row, place = (int(i) for i in np.argwhere(~finite)[0])
        raise DataError(f"column {numeric.columns[place]!r}: NaN or infinity in row {row}; fill or drop gaps first.")
    return numeric if index is None else numeric.set_index(pd.DatetimeIndex(index))


def _time_index(table: pd.DataFrame, time_column: str | None) -> pd.Series | None:
    candidates = [time_column] if time_column else [c for c in table.columns if table[c].dtype.kind not in "fiub"]
    for name in candidates:
        try:
            return pd.to_datetime(table[name], format="ISO8601").rename(name)
        except (ValueError, TypeError) as error:
            if time_column:
                raise DataError(f"time_column {name!r}: not ISO 8601 times ({error}).") from error
    return None
