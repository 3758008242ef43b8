"""Named datasets: real series that a dependency ships, and public ones found locally or downloaded.

See docs/guides/backends.md#bundled-forecaster.
"""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd

from sdt_dist.data.series import Series, read_csv
from sdt_dist.errors import ConfigurationError, DataError, ResultsError, unknown_name
from sdt_dist.files import replace_file

_ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
_M4_URL = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/master/Dataset/"
FILES = {
    "ETTh1.csv": (_ETT_URL, "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
    "ETTh2.csv": (_ETT_URL, None),
    "ETTm1.csv": (_ETT_URL, None),
    "ETTm2.csv": (_ETT_URL, None),
    "M4-Hourly-train.csv": (
        _M4_URL + "Train/",
        "ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f",
    ),
    "M4-Hourly-test.csv": (
        _M4_URL + "Test/",
        "71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42",
    ),
}
_MONTH_ROWS = {"etth1": 720, "etth2": 720, "ettm1": 2880, "ettm2": 2880}
CLASSIC = ("co2", "sunspots", "elnino")
_NAMES = (*CLASSIC, "classic", *_MONTH_ROWS, "m4_hourly")


def dataset_names() -> list[str]:
    """Names that `load_series` knows; a path to a CSV works too."""
    return list(_NAMES)


def check_dataset(dataset: str) -> None:
    """Refuse an unknown name or a missing file before anything is loaded."""
    if dataset in _NAMES or Path(dataset).is_file():
        return
    if Path(dataset).is_dir():
        raise DataError(
            f"dataset: {dataset!r} is a directory, allowed: a CSV file, or {', '.join(_NAMES)}."
        )
    if Path(dataset).suffix or "/" in dataset:
        raise DataError(f"dataset: file {dataset!r} does not exist.")
    raise unknown_name("dataset", dataset, _NAMES)


def load_series(
    dataset: str, *, season: int | None = None, column: str | Sequence[str] | None = None
) -> list[Series]:
    """All channels of a dataset, or those named by `column`. season: replaces the dataset's own (1 for a CSV).

    DataError when a file is missing and cannot be downloaded, lacks a channel, or holds bad values.
    """
    check_dataset(dataset)
    if season is not None and season < 1:
        raise ConfigurationError(f"season: {season}, must be >= 1.")
    found = _named(dataset, column) if dataset in _NAMES else _own(Path(dataset), column)
    return found if season is None else [replace(series, season=season) for series in found]


def _named(dataset: str, column: str | Sequence[str] | None) -> list[Series]:
    if dataset == "m4_hourly":
        found = _m4_hourly()
    elif dataset in _MONTH_ROWS:
        found = _ett(dataset)
    else:
        found = [_classic(name) for name in (CLASSIC if dataset == "classic" else (dataset,))]
    if column is None:
        return found
    wanted = {column} if isinstance(column, str) else set(column)
    known = [series.name for series in found]
    if wanted - set(known):
        raise DataError(
            f"channels: {min(wanted - set(known))!r}, allowed: {', '.join(known[:20])}."
        )
    return [series for series in found if series.name in wanted]


def _own(path: Path, column: str | Sequence[str] | None) -> list[Series]:
    table = read_csv(path, column=column)
    times = table.index if isinstance(table.index, pd.DatetimeIndex) else None
    return [Series(str(name), table[name].to_numpy(np.float64), 1, times) for name in table.columns]


def _classic(name: str) -> Series:
    """statsmodels' series: weekly CO2 as monthly means (gaps interpolated), yearly sunspots, monthly El Nino."""
    from statsmodels.datasets import co2, elnino, sunspots

    if name == "co2":
        monthly = _table(co2)["co2"].resample("MS").mean().interpolate()
        return Series("co2", monthly.to_numpy(np.float64), 12, pd.DatetimeIndex(monthly.index))
    if name == "sunspots":
        table = _table(sunspots)
        times = pd.to_datetime(table["YEAR"].astype(int).astype(str), format="%Y")
        return Series(
            "sunspots", table["SUNACTIVITY"].to_numpy(np.float64), 11, pd.DatetimeIndex(times)
        )
    table = _table(elnino)
    values = table.drop(columns="YEAR").to_numpy(np.float64).ravel()
    times = pd.date_range(f"{int(table['YEAR'].iloc[0])}-01-01", periods=len(values), freq="MS")
    return Series("elnino", values, 12, times)


def _table(dataset: ModuleType) -> pd.DataFrame:
    return dataset.load_pandas().data


def _ett(name: str) -> list[Series]:
    """12/4/4 months of 30 days for training, validation and test; z-scored by the training part."""
    file = f"ETT{name[3:]}.csv"
    table = read_csv(find_file(file), time_column="date")
    month = _MONTH_ROWS[name]
    splits = {
        "train": (0, 12 * month),
        "val": (12 * month, 16 * month),
        "test": (16 * month, 20 * month),
    }
    season = 24 if name.startswith("etth") else 96
    train = table.iloc[: 12 * month]
    return [
        Series(
            str(c), table[c].to_numpy(np.float64), season, pd.DatetimeIndex(table.index), splits,
            float(train[c].mean()), float(train[c].std(ddof=0)),
        )
        for c in table.columns
    ]  # fmt: skip


def _m4_hourly() -> list[Series]:
    """414 hourly series: the training file's values, then the test file's 48, which are the only targets."""
    train, test = (pd.read_csv(find_file(f"M4-Hourly-{part}.csv")) for part in ("train", "test"))
    found = []
    for (_, history), (_, future) in zip(train.iterrows(), test.iterrows(), strict=True):
        past = history.iloc[1:].to_numpy(np.float64)
        past = past[~np.isnan(past)]
        values = np.concatenate([past, future.iloc[1:].to_numpy(np.float64)])
        found.append(
            Series(str(history.iloc[0]), values, 24, None, {"test": (len(past), len(values))})
        )
    return found


def find_file(name: str) -> Path:
    """A dataset's file: in SDT_DATA_DIR, in the cache, or downloaded there and checked against its SHA-256.

    A file of which no SHA-256 is known is never downloaded. DataError where it cannot be had.
    """
    folder = os.environ.get("SDT_DATA_DIR")
    if folder and (Path(folder) / name).is_file():
        return Path(folder) / name
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sdt-dist" / name
    if not cache.is_file():
        _keep(_download(name), cache)
    return cache


def _download(name: str) -> bytes:
    base, digest = FILES[name]
    url = base + name.replace("M4-", "")
    advice = "put it into a folder and set SDT_DATA_DIR to that folder."
    if digest is None:
        raise DataError(
            f"dataset file {name}: not in SDT_DATA_DIR, and not downloaded, because no checksum of it is known; get it "
            f"from {url}, {advice}"
        )
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            content = reply.read()
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"dataset file {name}: not in SDT_DATA_DIR and cannot be downloaded ({reason}); {advice}"
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(
            f"dataset file {name}: the download's SHA-256 is not {digest}; nothing was kept."
        )
    return content


def _keep(content: bytes, target: Path) -> None:
    """Write a whole file or none."""
    try:
        replace_file(target, lambda temporary: temporary.write_bytes(content))
    except ResultsError as error:
        raise DataError(
            f"dataset file {target.name}: cannot be kept in {target.parent} ({error.__cause__})."
        ) from error
