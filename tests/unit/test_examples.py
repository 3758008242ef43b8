"""The examples run as they stand, with the series that is beside them, and nothing is downloaded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sdt_dist.actors.config import load_fleet
from sdt_dist.evaluation.plan import load_config
from sdt_dist.evaluation.results import read_lines
from sdt_dist.training.flow.config import load_train_config
from sdt_dist.tune.config import load_sweep
from tests.evaluation_helpers import evaluate_into

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def _run(name: str, *arguments: object) -> str:
    """What a script prints; it must succeed and warn of nothing."""
    command = [sys.executable, "-W", "error", EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_series_is_the_script_s(tmp_path):
    _run("make_series.py", tmp_path / "load.csv")
    assert (tmp_path / "load.csv").read_bytes() == (EXAMPLES / "load.csv").read_bytes()


def test_the_series_has_a_day_and_a_week():
    table = pd.read_csv(EXAMPLES / "load.csv", parse_dates=["date"])
    assert list(table.columns) == ["date", "load"] and len(table) == 672
    assert (table["date"].diff().dropna() == pd.Timedelta(hours=1)).all()
    by_hour = table.groupby(table["date"].dt.hour)["load"].mean()
    by_day = table.groupby(table["date"].dt.day_of_week)["load"].mean()
    assert by_hour.idxmax() == 19 and by_hour.max() - by_hour.min() > 10
    assert set(by_day.nsmallest(2).index) == {5, 6}


def test_a_forecast(tmp_path):
    shown, _, table = _run("forecast.py").partition("date ")
    assert "SearchResult of snis" in shown and "log Z" in shown and "ESS" in shown
    rows = [list(map(float, line.split()[2:])) for line in table.splitlines()[1:]]
    low, middle, high = np.array(rows).T
    assert len(rows) == 24 and (low < middle).all() and (middle < high).all()


def test_a_reward_of_one_s_own():
    alone, rewarded = map(int, re.findall(r"(\d+)% of the samples", _run("own_reward.py")))
    assert rewarded < alone / 2


def test_the_reward_s_file_is_one_for_the_command_line(sdt, monkeypatch):
    monkeypatch.chdir(ROOT)
    reward = "examples/own_reward.py:peak_below_limit"
    sizes = ["--rollouts", 8, "--num-samples", 8, "--horizon", 8]
    code, out, err = sdt("forecast", "examples/load.csv", "--reward", reward, *sizes)
    assert code == 0, err
    assert len(out.splitlines()) == 9


def test_generating_text():
    out = _run("generate.py")
    samples = re.findall(r"^reward ([01]): the (.+)$", out, flags=re.MULTILINE)
    assert len(samples) == 6
    assert all((reward == "1") == bool(re.search("dog.*cat", text)) for reward, text in samples)
    assert sum(reward == "1" for reward, _ in samples) >= 4


def test_an_evaluation(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    evaluate_into(tmp_path / "run", "examples/load.yaml")
    lines = list(read_lines(tmp_path / "run"))
    assert {line["status"] for line in lines} == {"ok"}
    assert {line["label"] for line in lines} == {"sample", "snis", "residual_ts"}
    assert len(lines) == 12


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_one_of_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    kind = path.stem.partition("_")[0]
    load = {"fleet": load_fleet, "flow": load_train_config, "tune": load_sweep}.get(
        kind, load_config
    )
    assert load(str(path), {}).model_fields_set
