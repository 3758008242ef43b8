"""Series from a CSV file: its numeric columns and its times, or a DataError that names column and row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sdt_dist.errors import DataError, unknown_name


def read_csv(
    path: Path, *, column: str | Sequence[str] | None = None, time_column: str | None = None
) -> pd.DataFrame:
    """Numeric columns of a CSV (or `column`), indexed by its time column (the first that holds times) if there is one.

    Columns of text only are left out. DataError, with column and row (counted from 0), for NaN or infinity, for text
    among numbers, and for times that are empty or do not increase; for a missing file or column too.
    """
    table = _parse(path)
    wanted = [column] if isinstance(column, str) else list(column or [])
    for name in [*wanted, time_column]:
        if name is not None and name not in table.columns:
            raise DataError(str(unknown_name("column", name, map(str, table.columns))))
    index = _time_index(table, time_column)
    values = table.drop(columns=[index.name] if index is not None else [])
    _refuse_text_among_numbers(
        values.loc[:, [name for name in values.columns if name in wanted or not wanted]]
    )
    numeric = values.select_dtypes("number")
    for name in wanted:
        if name not in numeric.columns:
            raise DataError(
                f"column {name!r}: not numeric; allowed: {', '.join(map(str, numeric.columns))}."
            )
    if wanted:
        numeric = numeric.loc[:, [name for name in numeric.columns if name in wanted]]
    if numeric.empty:
        raise DataError(f"data: {path} has no numeric column.")
    finite = np.isfinite(numeric.to_numpy(dtype=np.float64))
    if not finite.all():
        row, place = (int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            f"column {numeric.columns[place]!r}: NaN or infinity in row {row}; fill or drop gaps first."
        )
    return numeric if index is None else numeric.set_index(pd.DatetimeIndex(index))


def _parse(path: Path) -> pd.DataFrame:
    """The table as pandas reads it; a row longer than the header is refused, never taken for an index."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, index_col=False, low_memory=False)
    except FileNotFoundError as error:
        raise DataError(f"data: file {str(path)!r} does not exist.") from error
    except OSError as error:
        raise DataError(
            f"data: {path} cannot be read ({error.strerror or error}); allowed: a CSV file."
        ) from error
    except (ValueError, pd.errors.ParserWarning) as error:
        raise DataError(f"data: {path} is not a CSV ({' '.join(str(error).split())}).") from error


def _refuse_text_among_numbers(table: pd.DataFrame) -> None:
    for name, cells in table.items():
        numbers = np.asarray(pd.to_numeric(cells, errors="coerce"), dtype=np.float64)
        is_text = np.isnan(numbers) & cells.notna().to_numpy()
        if is_text.any() and not np.isnan(numbers).all():
            row = int(is_text.argmax())
            raise DataError(
                f"column {name!r}: {cells.iloc[row]!r} in row {row} is text, others are numbers; correct it."
            )


def _time_index(table: pd.DataFrame, time_column: str | None) -> pd.Series | None:
    """The named column, or the first one that is not numeric and holds times, checked."""
    candidates = (
        [time_column]
        if time_column
        else [c for c in table.columns if table[c].dtype.kind not in "fiub"]
    )
    for name in candidates:
        cells = pd.Series(table[name], name=name)
        try:
            times = pd.to_datetime(cells, format="ISO8601")
        except (ValueError, TypeError) as error:
            if time_column:
                reason = " ".join(str(error).split())
                raise DataError(f"time_column {name!r}: not ISO 8601 times ({reason}).") from error
            _refuse_text_among_times(cells)
            continue
        _refuse_disorder(times, cells)
        return times
    return None


def _refuse_text_among_times(cells: pd.Series) -> None:
    """DataError for a column that is mostly times, so that its times are not lost without a word."""
    times = pd.to_datetime(cells, format="ISO8601", errors="coerce", utc=True)
    is_text = (cells.notna() & times.isna()).to_numpy()
    if is_text.sum() < times.notna().sum():
        row = int(is_text.argmax())
        what = (
            f"{cells.iloc[row]!r} in row {row} is no ISO 8601 time"
            if is_text.any()
            else "several time zones"
        )
        raise DataError(f"time column {cells.name!r}: {what}; correct it.")


def _refuse_disorder(times: pd.Series, cells: pd.Series) -> None:
    """DataError for an empty time, and for one that is not after the one before."""
    empty = times.isna().to_numpy()
    if empty.any():
        raise DataError(
            f"time column {cells.name!r}: no time in row {int(empty.argmax())}; fill it or drop the row."
        )
    late = np.flatnonzero(np.diff(times.astype("int64").to_numpy()) <= 0)
    if len(late):
        row = int(late[0]) + 1
        raise DataError(
            f"time column {cells.name!r}: {cells.iloc[row]!r} in row {row} is not after {cells.iloc[row - 1]!r}; sort "
            "rows by time, oldest first, one row a time."
        )
