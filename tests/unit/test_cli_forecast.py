"""`sdt forecast` and `sdt train-forecaster`: one line and exit code 2 for a mistake, and what they print and write.

See docs/reference/cli.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from sdt_dist.cluster.commands.forecast import _future
from sdt_dist.errors import DataError

ROOT = Path(__file__).parents[2]
QUANTILES = [f"q0.{i}" for i in range(1, 10)]

pytestmark = pytest.mark.usefixtures("one_thread")


def _wave(rows: int = 120) -> np.ndarray:
    return 10 + np.sin(np.arange(rows) / 4) + 0.1 * np.random.default_rng(0).standard_normal(rows)


def _csv(path: Path, values: np.ndarray, frequency: str | None = None, **columns) -> Path:
    times = (
        {}
        if frequency is None
        else {"time": pd.date_range("2021-01-01", periods=len(values), freq=frequency)}
    )
    pd.DataFrame({**times, "load": values, **columns}).to_csv(path, index=False)
    return path


@pytest.fixture
def hourly(tmp_path) -> Path:
    return _csv(tmp_path / "hourly.csv", _wave(), "h")


@pytest.fixture
def plain(tmp_path) -> Path:
    """A series without times, beside a column of another scale."""
    return _csv(tmp_path / "plain.csv", _wave(), other=1e6 + 1e5 * _wave())


def _forecast(path: Path, *more: object) -> list[object]:
    return ["forecast", path, "--horizon", 8, "--rollouts", 8, "--num-samples", 12, *more]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.where(np.arange(120) == 5, np.nan, _wave()), ["load", "NaN", "row 5"]),
        (np.where(np.arange(120) == 7, np.inf, _wave()), ["load", "infinity", "row 7"]),
        (_wave(10), ["history", "10", "at least 16"]),
        (np.full(120, 3.0), ["history", "constant"]),
    ],
    ids=["nan", "infinity", "short", "constant"],
)
def test_an_unusable_series_is_refused(early_mistake, tmp_path, values, words):
    path = _csv(tmp_path / "bad.csv", values, "h")
    line = early_mistake(*_forecast(path, "--output", tmp_path / "out.csv"))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--column", "lod"], ["lod", "Did you mean 'load'"]),
        (["--time-column", "tme"], ["tme", "Did you mean 'time'"]),
        (["--column", "time"], ["time", "not numeric", "load"]),
        (["--horizon", 500], ["history", "120", "500"]),
        (["--horizon", 500, "--reward", "nonneg"], ["horizon", "500", "192"]),
        (["--quantiles", "0.1,x"], ["quantiles", "0.1,x"]),
        (["--quantiles", "0,0.5"], ["quantiles", "0,0.5"]),
        (["--quantiles", "nan"], ["quantiles", "nan"]),
        (["--method", "sniss"], ["sniss", "Did you mean 'snis'"]),
        (["--model", "./absent"], ["./absent", "does not exist"]),
        (["--reward", "nonnegg"], ["nonnegg", "Did you mean 'nonneg'"]),
        (["--reward", "absent.py:score"], ["absent.py", "does not exist"]),
        (["--reward", "crps"], ["CRPS", "true future"]),
        (["--inverse-temperature", 0], ["inverse_temperature", "0"]),
        (["--reward", "length:target=3"], ["length", "series"]),
        (["--reward", "regex:a"], ["regex:a", "series"]),
        (["--horizon", 3], ["horizon 3", ">= 4"]),
        (["--plot", "fan.foo"], ["plot", "fan.foo", ".png"]),
        (["--plot", "fan"], ["plot", "fan", ".png"]),
        (["--plot", "FILE/fan.png"], ["plot", "cannot be written"]),
        (["--output", "FILE/deep/out.csv"], ["output", "cannot be written"]),
        (["--samples", "FILE/s.csv"], ["samples", "cannot be written"]),
        (["--output", "."], ["output", "not a file"]),
        (["--output", "same.csv", "--samples", "./same.csv"], ["output, samples", "same file"]),
    ],
)
def test_a_wrong_option_of_forecast_is_refused(request, monkeypatch, hourly, options, words):
    """Before the model loads, except for the horizon that only the model knows to be too long."""
    mistake = request.getfixturevalue("mistake" if "192" in words else "early_mistake")
    monkeypatch.chdir(hourly.parent)
    Path("FILE").write_text("kept")
    line = mistake(*_forecast(hourly, *options))
    assert all(word in line for word in words), line
    assert {path.name for path in hourly.parent.iterdir()} == {"FILE", hourly.name}


@pytest.mark.parametrize(
    "rows", [["2021-01-01"] * 2, ["2021-01-02", "2021-01-01"], ["2021-01-01", "NaT"]]
)
def test_times_that_do_not_increase_are_refused(early_mistake, tmp_path, rows):
    times = [str(time) for time in pd.date_range("2020-01-01", periods=118)] + rows
    pd.DataFrame({"time": times, "load": _wave()}).to_csv(tmp_path / "times.csv", index=False)
    assert "time" in early_mistake(*_forecast(tmp_path / "times.csv"))
    table = pd.DataFrame({"load": _wave()}, index=pd.DatetimeIndex(times))
    with pytest.raises(DataError, match="increase"):
        _future(table, 8)


def test_missing_and_empty_files_are_refused(mistake, tmp_path):
    assert "absent.csv" in mistake("forecast", tmp_path / "absent.csv")
    (tmp_path / "empty.csv").write_text("")
    assert "empty.csv" in mistake("forecast", tmp_path / "empty.csv")


def test_checks_and_dry_runs_load_no_model_and_write_nothing(tmp_path, hourly):
    """In a real process, whose last command is a mistake that nothing catches."""
    code = f"""
import contextlib, io, sys
sys.path.insert(0, {str(ROOT)!r})
from sdt_dist.cluster.cli import main
sys.argv = ["sdt", "evaluate", "--num-problems", "3", "--methods", "sample,dts", "--output", "run", "--dry-run"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main()
print("torch" in sys.modules, "3 problems x 2 methods" in out.getvalue(), flush=True)
sys.argv = ["sdt", "forecast", {str(hourly)!r}, "--method", "dst"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "False True\n")
    assert re.fullmatch(r"sdt: unknown method 'dst'\. .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == [hourly.name]


@pytest.mark.parametrize("frequency", ["h", "15min", "B", "W-WED", "MS", "YE"])
def test_timestamps_continue_the_series(sdt, tmp_path, frequency):
    path = _csv(tmp_path / "series.csv", _wave(), frequency)
    code, out, _ = sdt(*_forecast(path))
    assert code == 0
    found = pd.to_datetime(pd.read_csv(io.StringIO(out))["timestamp"])
    assert found.tolist() == pd.date_range("2021-01-01", periods=128, freq=frequency)[120:].tolist()


def test_without_times_rows_are_numbered(sdt, plain):
    _, out, _ = sdt(*_forecast(plain))
    assert pd.read_csv(io.StringIO(out))["timestamp"].tolist() == list(range(120, 128))


def test_a_forecast_is_the_mean_and_quantiles_of_its_samples(sdt, plain, tmp_path):
    out = tmp_path / "out.csv"
    every = tmp_path / "samples.csv"
    plot = tmp_path / "fan.png"
    code, printed, _ = sdt(
        *_forecast(plain, "--output", out, "--samples", every, "--plot", plot, "--season", 25)
    )
    assert (code, printed) == (0, "")
    frame = pd.read_csv(out)
    samples = pd.read_csv(every)
    assert list(frame.columns) == ["timestamp", "mean", *QUANTILES] and len(frame) == 8
    assert list(samples.columns) == ["timestamp", *(f"s{i}" for i in range(12))]
    assert frame["timestamp"].tolist() == samples["timestamp"].tolist()
    paths = samples.drop(columns="timestamp").to_numpy()
    assert (np.diff(frame[QUANTILES].to_numpy(), axis=1) >= 0).all()
    np.testing.assert_allclose(frame["mean"], paths.mean(axis=1), rtol=2e-7)
    np.testing.assert_allclose(
        frame[QUANTILES].T, np.quantile(paths, np.arange(1, 10) / 10, axis=1), rtol=2e-7
    )
    assert np.ptp(matplotlib.image.imread(plot)[..., :3]) == 1.0


def test_folders_are_made_and_one_failed_output_loses_none(sdt, mistake, plain, tmp_path):
    out = tmp_path / "out.csv"
    every = tmp_path / "a" / "b" / "samples.csv"
    plot = tmp_path / "c" / "fan.svg"
    (tmp_path / "out.csv.tmp").mkdir()
    code, printed, err = sdt(*_forecast(plain, "--output", out, "--samples", every, "--plot", plot))
    assert code == 2 and re.fullmatch(
        r"sdt: output: .*out.csv cannot be written .*printed.*\n", err
    )
    assert (
        not out.exists() and len(pd.read_csv(every)) == 8 and plot.read_text().startswith("<?xml")
    )
    assert list(pd.read_csv(io.StringIO(printed)).columns) == ["timestamp", "mean", *QUANTILES]


def test_a_forecast_repeats_by_its_seed(sdt, plain):
    first, again, other = (sdt(*_forecast(plain, "--seed", seed))[1] for seed in (3, 3, 4))
    assert first == again != other


def test_columns_and_quantiles_are_chosen(sdt, plain):
    for options, scale in ((["--column", "load"], 10), (["--column", "other"], 2e6), ([], 2e6)):
        code, out, _ = sdt(*_forecast(plain, "--quantiles", "0.05,0.5", *options))
        frame = pd.read_csv(io.StringIO(out))
        assert code == 0 and list(frame.columns) == ["timestamp", "mean", "q0.05", "q0.5"]
        assert frame["mean"].between(0.5 * scale, 2 * scale).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "absent.csv"], ["data", "absent.csv"]),
        (["--data", "binary.csv"], ["data", "binary.csv", "CSV"]),
        (["--device", "tpu"], ["device", "tpu", "cpu"]),
        (["--output", "binary.csv"], ["output", "binary.csv"]),
        (["--adam-lr", "nan"], ["adam_lr", "nan"]),
    ],
)
def test_a_wrong_option_of_train_forecaster_is_refused(
    mistake, monkeypatch, tmp_path, options, words
):
    monkeypatch.chdir(tmp_path)
    Path("binary.csv").write_bytes(bytes(range(256)) * 9)
    line = mistake("train-forecaster", "--output", "run", *options)
    assert all(word in line for word in words), line
    assert not Path("run").exists()


def test_a_trained_forecaster_forecasts(sdt, plain, tmp_path):
    rows = _csv(tmp_path / "long.csv", _wave(800))
    options = [
        "--init",
        "bundled",
        "--data",
        rows,
        "--steps",
        1,
        "--batch-size",
        1,
        "--output",
        tmp_path / "own",
    ]
    code, out, _ = sdt("train-forecaster", *options)
    assert code == 0 and f"--model {tmp_path / 'own'}" in out
    assert sdt(*_forecast(plain, "--model", tmp_path / "own"))[0] == 0
