"""Named datasets: real series that a dependency ships, and public ones found locally or downloaded (SPEC section 5)."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd

from sdt_dist.data.series import Series, read_csv
from sdt_dist.errors import DataError, unknown_name

_ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
_M4_URL = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/master/Dataset/"
FILES = {
    "ETTh1.csv": (_ETT_URL, "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
    "ETTh2.csv": (_ETT_URL, None),
    "ETTm1.csv": (_ETT_URL, None),
    "ETTm2.csv": (_ETT_URL, None),
    "M4-Hourly-train.csv": (_M4_URL + "Train/", "ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f"),
    "M4-Hourly-test.csv": (_M4_URL + "Test/", "71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42"),
}
_MONTH_ROWS = {"etth1": 720, "etth2": 720, "ettm1": 2880, "ettm2": 2880}
CLASSIC = ("co2", "sunspots", "elnino")
_NAMES = (*CLASSIC, "classic", *_MONTH_ROWS, "m4_hourly")


def dataset_names() -> list[str]:
    """Names that `load_series` knows; a path to a CSV works too."""
    return list(_NAMES)


def check_dataset(dataset: str) -> None:
    """Refuse an unknown name or a missing file before anything is loaded."""
    if dataset not in _NAMES and not Path(dataset).is_file():
        if Path(dataset).suffix or "/" in dataset:
            raise DataError(f"dataset: file {dataset!r} does not exist.")
        raise unknown_name("dataset", dataset, _NAMES)


def load_series(dataset: str, *, season: int | None = None, column: str | None = None) -> list[Series]:
    """All channels of a dataset. DataError when a file is missing and cannot be downloaded, or holds bad values."""
    check_dataset(dataset)
    if dataset == "classic":
        return [series for name in CLASSIC for series in load_series(name)]
    if dataset in CLASSIC:
        return [_classic(dataset)]
    if dataset in _MONTH_ROWS:
        return _ett(dataset)
    if dataset == "m4_hourly":
        return _m4_hourly()
    table = read_csv(Path(dataset), column=column)
    times = table.index if isinstance(table.index, pd.DatetimeIndex) else None
    return [Series(str(name), table[name].to_numpy(np.float64), season or 1, times) for name in table.columns]


def _classic(name: str) -> Series:
    """statsmodels' series: weekly CO2 as monthly means (gaps interpolated), yearly sunspots, monthly El Nino."""
    from statsmodels.datasets import co2, elnino, sunspots

    if name == "co2":
        monthly = _table(co2)["co2"].resample("MS").mean().interpolate()
        return Series("co2", monthly.to_numpy(np.float64), 12, pd.DatetimeIndex(monthly.index))
    if name == "sunspots":
        table = _table(sunspots)
        times = pd.to_datetime(table["YEAR"].astype(int).astype(str), format="%Y")
        return Series("sunspots", table["SUNACTIVITY"].to_numpy(np.float64), 11, pd.DatetimeIndex(times))
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
    splits = {"train": (0, 12 * month), "val": (12 * month, 16 * month), "test": (16 * month, 20 * month)}
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
        found.append(Series(str(history.iloc[0]), values, 24, None, {"test": (len(past), len(values))}))
    return found


def find_file(name: str) -> Path:
    """A dataset's file: in SDT_DATA_DIR, in the cache, or downloaded there and checked against its SHA-256."""
    folder = os.environ.get("SDT_DATA_DIR")
    if folder and (Path(folder) / name).is_file():
        return Path(folder) / name
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sdt-dist" / name
    if not cache.is_file():
        _download(name, cache)
    return cache


def _download(name: str, target: Path) -> None:
    base, digest = FILES[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(base + name.replace("M4-", ""), timeout=20) as reply:
            content = reply.read()
    except OSError as error:
        raise DataError(
            f"dataset file {name}: not in SDT_DATA_DIR and cannot be downloaded ({error}); put it into a folder and set "
            "SDT_DATA_DIR to that folder."
        ) from error
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"dataset file {name}: the download's SHA-256 is not {digest}; nothing was kept.")
    temporary = target.with_suffix(".part")
    temporary.write_bytes(content)
    temporary.replace(target)
