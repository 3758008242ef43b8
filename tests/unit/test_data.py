"""Laws of datasets and windows: what a history may hold, where splits lie, and what bad input answers."""

from __future__ import annotations

import hashlib
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sdt_dist.data import check_dataset, dataset_names, load_problems, load_series, registry
from sdt_dist.data.reader import read_csv
from sdt_dist.data.registry import find_file
from sdt_dist.data.scale import MIN_HISTORY
from sdt_dist.errors import ConfigurationError, ContextError, DataError

WINDOWS = [
    (1, 16, None),
    (5, 64, None),
    (24, 512, None),
    (7, 30, 3),
    (10, 400, 25),
    (90, 100, None),
]


@pytest.fixture
def csv(tmp_path):
    """Writes a CSV from columns and gives its path."""

    def write(**columns) -> str:
        pd.DataFrame(columns).to_csv(tmp_path / "own.csv", index=False)
        return str(tmp_path / "own.csv")

    return write


@pytest.mark.parametrize(
    ("name", "length", "season", "first", "step"),
    [
        ("co2", 526, 12, "1958-03-01", "MS"),
        ("sunspots", 309, 11, "1700-01-01", "YS"),
        ("elnino", 732, 12, "1950-01-01", "MS"),
    ],
)
def test_classic_series_are_finite_and_regular(name, length, season, first, step):
    (series,) = load_series(name)
    assert (series.name, len(series.values), series.season) == (name, length, season)
    assert np.isfinite(series.values).all()
    assert list(series.timestamps) == list(pd.date_range(first, periods=length, freq=step))


def test_classic_is_all_of_them_and_the_values_are_the_published_ones():
    co2, sunspots, elnino = load_series("classic")
    assert [co2.name, sunspots.name, elnino.name] == ["co2", "sunspots", "elnino"]
    assert sunspots.values[:3].tolist() == [5.0, 11.0, 16.0]
    assert elnino.values[[0, 1, 12]].tolist() == [23.11, 24.2, 24.19]
    assert co2.values[:2] == pytest.approx([316.1, (317.3 + 317.6 + 317.5 + 316.4) / 4])


@pytest.mark.parametrize(("horizon", "context_length", "stride"), WINDOWS)
def test_the_truth_follows_the_history_and_is_never_in_it(csv, horizon, context_length, stride):
    """On the series 0, 1, 2, ... a value is its row."""
    path = csv(a=np.arange(500.0))
    problems = load_problems(path, horizon=horizon, context_length=context_length, stride=stride)
    starts = [int(p.truth[0]) for p in problems]
    assert [p.index for p in problems] == list(range(len(problems))) and problems
    for problem, start in zip(problems, starts, strict=True):
        np.testing.assert_array_equal(problem.truth, np.arange(start, start + horizon))
        np.testing.assert_array_equal(
            problem.history, np.arange(max(0, start - context_length), start)
        )
        assert problem.name == f"a@{start}"
    assert np.diff(starts).tolist() == [stride or horizon] * (len(starts) - 1)
    assert starts[-1] + horizon == 500
    assert starts[0] >= 500 - max(125, horizon)


@pytest.mark.parametrize("wanted", [1, 2, 5, 1000])
def test_an_even_choice_of_problems(csv, wanted):
    path = csv(a=np.arange(400.0), b=np.arange(400.0) ** 2)
    everything = [p.name for p in load_problems(path, horizon=4)]
    chosen = [p.name for p in load_problems(path, horizon=4, num_problems=wanted)]
    assert len(everything) == len(set(everything)) == 50
    assert len(chosen) == len(set(chosen)) == min(wanted, 50)
    assert chosen == [name for name in everything if name in chosen]
    assert chosen[0] == everything[0] and (wanted == 1 or chosen[-1] == everything[-1])


def test_without_splits_metrics_scale_by_the_problems_own_history(csv):
    path = csv(a=np.random.default_rng(0).standard_normal(300).cumsum())
    for problem in load_problems(path, horizon=10, context_length=50, season=7):
        assert problem.loc == problem.history.mean() and problem.scale == problem.history.std()
        assert problem.season == 7


def test_timestamps_and_channels_belong_to_their_window(csv):
    times = pd.date_range("2024-01-01", periods=200, freq="h")
    path = csv(when=times.astype(str), a=np.arange(200.0), b=-np.arange(200.0))
    assert [s.name for s in load_series(path)] == ["a", "b"]
    problems = load_problems(path, horizon=10, context_length=40, channels=["b"])
    assert problems
    for problem in problems:
        rows = -np.concatenate([problem.history, problem.truth]).astype(int)
        assert list(problem.timestamps) == list(times[rows])


def test_no_history_is_shorter_than_a_model_or_a_spectrum_needs(csv):
    for horizon in (2, 40):
        problems = load_problems(csv(a=np.arange(100.0)), horizon=horizon, stride=1)
        assert min(len(p.history) for p in problems) >= max(MIN_HISTORY, horizon)


@pytest.mark.parametrize(("rows", "horizon"), [(100, 51), (100, 101), (30, 15), (17, 2), (16, 1)])
def test_a_horizon_that_leaves_too_little_history_is_refused(csv, rows, horizon):
    with pytest.raises(
        DataError, match=rf"no window with 16 values of history and horizon {horizon}.*shorten"
    ):
        load_problems(csv(a=np.arange(float(rows))), horizon=horizon)


def test_a_context_too_short_to_scale_is_refused(csv):
    with pytest.raises(ContextError, match="at least 16 values"):
        load_problems(csv(a=np.arange(100.0)), horizon=5, context_length=15)
    assert load_problems(csv(a=np.arange(100.0)), horizon=5, context_length=16)


@pytest.mark.parametrize(
    "bad",
    [
        {"horizon": 0},
        {"horizon": -3},
        {"stride": 0},
        {"num_problems": 0},
        {"season": 0},
        {"season": -1},
    ],
)
def test_counts_below_one_are_refused(csv, bad):
    (name, value), path = next(iter(bad.items())), csv(a=np.arange(100.0))
    with pytest.raises(ConfigurationError, match=f"{name}: {value}, must be >= 1"):
        load_problems(path, **({"horizon": 5} | bad))


def test_an_unknown_split_is_refused_for_every_dataset(csv):
    for dataset in (csv(a=np.arange(100.0)), "co2"):
        with pytest.raises(DataError, match=r"split: 'tets', allowed: train, val, test"):
            load_problems(dataset, horizon=5, split="tets")


def test_a_season_replaces_that_of_a_named_dataset():
    assert {p.season for p in load_problems("classic", horizon=12, season=5)} == {5}
    assert {p.season for p in load_problems("classic", horizon=12)} == {11, 12}
    assert [s.name for s in load_series("classic", column="elnino")] == ["elnino"]


def test_a_flat_window_is_one_problem_among_others(csv):
    values = np.random.default_rng(0).standard_normal(200).cumsum()
    values[140:170] = 4.0
    problems = load_problems(csv(a=values), horizon=5, context_length=20)
    flat = [p for p in problems if np.ptp(p.history) == 0]
    assert {p.name for p in flat} == {"a@160", "a@165", "a@170"} and len(problems) == 10
    assert {(p.loc, p.scale) for p in flat} == {(4.0, 1.0)}
    assert all(p.scale == p.history.std() for p in problems if np.ptp(p.history))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_a_constant_series_is_refused(csv, value):
    with pytest.raises(ContextError, match="constant"):
        load_problems(csv(a=np.full(100, value)), horizon=5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gap_is_refused_with_its_column_and_row(csv, bad):
    values = np.arange(60.0)
    values[37] = bad
    with pytest.raises(DataError, match=r"column 'b'.*row 37"):
        load_series(csv(a=np.arange(60.0), b=values))


def test_wrong_columns_are_refused_by_name(csv):
    path = csv(temperature=np.arange(30.0), place=["x"] * 30)
    with pytest.raises(DataError, match=r"'temprature'.*Did you mean 'temperature'"):
        load_series(path, column="temprature")
    with pytest.raises(DataError, match=r"'place': not numeric; allowed: temperature"):
        load_series(path, column="place")
    with pytest.raises(DataError, match=r"'humidity'. Known: place, temperature"):
        load_problems(path, horizon=5, channels=["humidity"])
    with pytest.raises(DataError, match=r"channels: 'humidity', allowed: co2"):
        load_problems("co2", horizon=5, channels=["humidity"])
    with pytest.raises(DataError, match=r"time_column 'place': not ISO 8601"):
        read_csv(Path(path), time_column="place")
    with pytest.raises(DataError, match="no numeric column"):
        load_series(csv(place=["x"] * 30))


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv.*does not exist"):
        load_series(str(tmp_path / "nowhere.csv"))
    with pytest.raises(DataError, match=r"nowhere\.csv.*does not exist"):
        read_csv(tmp_path / "nowhere.csv")
    for content in (
        b"",
        b"\xff\xfe\x00",
        b"\x80\x04\x95\n\x00",
        b"a,b\n1,2\n1,2,3\n",
        b"a,b\n1,2,3\n4,5,6\n",
    ):
        (tmp_path / "broken.csv").write_bytes(content)
        with pytest.raises(DataError, match=r"broken\.csv is not a CSV") as error:
            load_series(str(tmp_path / "broken.csv"))
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"cannot be read.*directory.*allowed: a CSV file"):
        read_csv(tmp_path)
    with pytest.raises(DataError, match="is a directory, allowed: a CSV file"):
        load_series(str(tmp_path))


TIMES = [f"2024-01-0{day}" for day in range(1, 7)]


def test_one_text_cell_does_not_make_a_column_vanish(csv):
    values = ["1", "2", "3", "4,5", "5", "6"]
    path = csv(when=TIMES, a=np.arange(6.0), b=values, place=list("xyzxyz"))
    for column in (None, "b", ["a", "b"]):
        with pytest.raises(DataError, match=r"column 'b': '4,5' in row 3 is text"):
            load_series(path, column=column)
    assert [s.name for s in load_series(path, column="a")] == ["a"]
    values[3] = "4.5"
    assert [s.name for s in load_series(csv(a=np.arange(6.0), b=values, place=list("xyzxyz")))] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize(
    ("row", "cell", "words"),
    [
        (2, "", "no time in row 2"),
        (0, "", "no time in row 0"),
        (3, "noon", "'noon' in row 3"),
        (3, TIMES[2], "'2024-01-03' in row 3 is not after '2024-01-03'.*oldest first"),
        (1, "2023-12-31", "'2023-12-31' in row 1 is not after '2024-01-01'"),
        (4, "2024-01-05T00:00:00+01:00", "time"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_time_column_is_whole_and_increasing(csv, row, cell, words, named):
    path = Path(csv(when=[*TIMES[:row], cell, *TIMES[row + 1 :]], a=np.arange(6.0)))
    with pytest.raises(
        DataError, match=rf"time.?column 'when'.*{'' if cell == 'noon' and named else words}"
    ) as error:
        read_csv(path, time_column="when" if named else None)
    assert "\n" not in str(error.value)
    newest_first = Path(csv(when=TIMES[::-1], a=np.arange(6.0)))
    with pytest.raises(DataError, match=r"row 1 is not after.*oldest first"):
        read_csv(newest_first)


def test_unknown_datasets_get_a_suggestion_and_known_ones_pass():
    for call in (check_dataset, load_series):
        with pytest.raises(ConfigurationError, match=r"'eth1'.*Did you mean '?etth1"):
            call("eth1")
    for name in dataset_names():
        check_dataset(name)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files; with `truncate`, it breaks off after half of the promised bytes."""

    truncate = False

    def log_message(self, format: str, *args: object) -> None:
        return

    def copyfile(self, source, outputfile) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.truncate else content)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A server of files in `public`, made the home of ETTh2.csv; the cache is empty and nothing else is set."""
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "ETTh2.csv").write_bytes(b"date,OT\n2020-01-01,1.5\n")
    monkeypatch.delenv("SDT_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "public")
    ) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}/"
        yield lambda digest: monkeypatch.setitem(registry.FILES, "ETTh2.csv", (base, digest))
        server.shutdown()
        thread.join()


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_download_with_another_checksum_keeps_nothing(home, tmp_path):
    home("0" * 64)
    for _ in range(2):
        with pytest.raises(DataError, match=r"ETTh2\.csv.*SHA-256 is not 0{64}; nothing was kept"):
            find_file("ETTh2.csv")
        assert cached(tmp_path) == []


def test_a_download_is_kept_once_and_not_asked_again(home, tmp_path):
    content = (tmp_path / "public" / "ETTh2.csv").read_bytes()
    home(hashlib.sha256(content).hexdigest())
    found = find_file("ETTh2.csv")
    (tmp_path / "public" / "ETTh2.csv").unlink()
    assert find_file("ETTh2.csv") == found and found.read_bytes() == content
    assert cached(tmp_path) == [found]


def test_a_file_that_cannot_be_had_says_where_to_put_it(home, tmp_path):
    home("0" * 64)
    (tmp_path / "public" / "ETTh2.csv").unlink()
    with pytest.raises(DataError, match=r"ETTh2\.csv.*cannot be downloaded.*404.*SDT_DATA_DIR"):
        find_file("ETTh2.csv")
    assert cached(tmp_path) == []


def test_a_truncated_download_keeps_nothing(home, tmp_path, monkeypatch):
    home("0" * 64)
    monkeypatch.setattr(Quiet, "truncate", True)
    with pytest.raises(
        DataError, match=r"ETTh2\.csv.*cannot be downloaded.*IncompleteRead.*SDT_DATA_DIR"
    ):
        find_file("ETTh2.csv")
    assert cached(tmp_path) == []


def test_without_a_checksum_nothing_is_downloaded(home, tmp_path, monkeypatch):
    home(None)
    with pytest.raises(DataError, match=r"ETTh2\.csv.*no checksum.*get it from http.*SDT_DATA_DIR"):
        find_file("ETTh2.csv")
    assert cached(tmp_path) == []
    monkeypatch.setenv("SDT_DATA_DIR", str(tmp_path / "public"))
    assert find_file("ETTh2.csv") == tmp_path / "public" / "ETTh2.csv"


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(home, tmp_path):
    home(hashlib.sha256((tmp_path / "public" / "ETTh2.csv").read_bytes()).hexdigest())
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"ETTh2\.csv: cannot be kept"):
        find_file("ETTh2.csv")


def raw(name: str) -> pd.DataFrame:
    return pd.read_csv(Path(os.environ["SDT_DATA_DIR"]) / name)


@pytest.mark.data
def test_etth1_has_seven_channels_scaled_by_the_training_rows():
    table = raw("ETTh1.csv")
    channels = load_series("etth1")
    assert (
        [s.name for s in channels]
        == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
        == list(table)[1:]
    )
    for series in channels:
        values = table[series.name].to_numpy()
        np.testing.assert_array_equal(series.values, values)
        assert series.splits == {"train": (0, 8640), "val": (8640, 11520), "test": (11520, 14400)}
        assert (series.season, str(series.timestamps[0])) == (24, "2016-07-01 00:00:00")
        assert (series.loc, series.scale) == pytest.approx(
            (values[:8640].mean(), values[:8640].std()), rel=1e-12
        )
        assert abs(series.loc - values[:14400].mean()) > 1e-3


@pytest.mark.data
@pytest.mark.parametrize(
    ("split", "first", "end"), [("train", 0, 8640), ("val", 8640, 11520), ("test", 11520, 14400)]
)
def test_etth1_targets_lie_in_their_split(split, first, end):
    problems = load_problems("etth1", horizon=96, split=split, channels=["OT"])
    values = raw("ETTh1.csv")["OT"].to_numpy()
    starts = np.array([int(p.name.removeprefix("OT@")) for p in problems])
    assert set(np.diff(starts)) == {96}
    assert first <= starts[0] < first + 2 * 96 and end - 96 < starts[-1] + 96 <= end
    for problem, start in zip(problems, starts, strict=True):
        np.testing.assert_array_equal(problem.truth, values[start : start + 96])
        np.testing.assert_array_equal(problem.history, values[max(0, start - 512) : start])
        assert (problem.loc, problem.scale) == pytest.approx(
            (values[:8640].mean(), values[:8640].std())
        )


@pytest.mark.data
def test_etth1_unknown_split_and_horizon_beyond_a_split_are_refused():
    with pytest.raises(DataError, match=r"split: 'tets', allowed: train, val, test"):
        load_problems("etth1", horizon=96, split="tets")
    with pytest.raises(DataError, match="shorten the horizon"):
        load_problems("etth1", horizon=2881)
    assert len(load_problems("etth1", horizon=2880)) == 7


@pytest.mark.data
def test_m4_hourly_targets_are_the_48_published_ones():
    train = raw("M4-Hourly-train.csv").set_index("V1")
    test = raw("M4-Hourly-test.csv").set_index("V1")
    problems = load_problems("m4_hourly", horizon=48, context_length=10_000)
    assert len(problems) == 414 and {p.season for p in problems} == {24}
    for problem in problems:
        name = problem.name.split("@")[0]
        np.testing.assert_array_equal(problem.truth, test.loc[name].to_numpy())
        np.testing.assert_array_equal(problem.history, train.loc[name].dropna().to_numpy())
    with pytest.raises(DataError, match="horizon 49"):
        load_problems("m4_hourly", horizon=49)
