"""stdout holds a command's results alone: bars and notes are on stderr, where it is a terminal, and nowhere else."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sdt_dist.cluster.bars import progress_bar
from sdt_dist.cluster.live import LiveView
from sdt_dist.evaluation.config import EvaluationConfig
from tests.evaluation_helpers import evaluate_into

pytestmark = pytest.mark.usefixtures("one_thread")

BAR, CLOCK = "━", "0:00:0"


@pytest.fixture
def terminal(monkeypatch) -> None:
    """rich takes stdout and stderr for terminals."""
    monkeypatch.setenv("FORCE_COLOR", "1")


@pytest.fixture
def series(tmp_path) -> Path:
    values = 10 + np.sin(np.arange(800) / 4) + 0.1 * np.random.default_rng(0).standard_normal(800)
    path = tmp_path / "load.csv"
    pd.DataFrame({"load": values}).to_csv(path, index=False)
    return path


def test_stdout_of_a_forecast_is_the_table_alone(sdt, terminal, series):
    code, out, _ = sdt("forecast", series, "--horizon", 8, "--rollouts", 8, "--num-samples", 12)
    table = pd.read_csv(io.StringIO(out))
    assert code == 0 and table.shape == (8, 11)
    assert np.isfinite(table.to_numpy(float)).all()


def test_the_bar_of_a_training_is_on_stderr(sdt, terminal, series, tmp_path):
    options = [
        "--data",
        series,
        "--steps",
        2,
        "--batch-size",
        1,
        "--output",
        tmp_path / "own",
        "--init",
        "bundled",
    ]
    code, out, err = sdt("train-forecaster", *options)
    assert code == 0 and BAR in err and CLOCK in err
    assert out == f"forecaster: {tmp_path / 'own'} (use it as --model {tmp_path / 'own'})\n"


def _evaluate(directory: Path) -> None:
    config = EvaluationConfig(
        dataset="classic",
        num_problems=2,
        horizon=8,
        context_length=64,
        num_rollouts=4,
        num_samples=4,
        methods=["snis"],
    )
    with LiveView() as view:
        view.say("a note")
        evaluate_into(directory, config, progress=view)


def test_the_view_of_a_run_writes_nothing_to_stdout(terminal, capsys, tmp_path):
    _evaluate(tmp_path / "run")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (
        BAR in printed.err
        and "snis" in printed.err
        and "2/2" in printed.err
        and "a note" in printed.err
    )


def test_without_a_terminal_there_are_notes_and_no_bar(capsys, tmp_path):
    _evaluate(tmp_path / "run")
    with progress_bar() as bar:
        bar.update(bar.add_task("training", total=1), completed=1)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "a note\n")


def test_what_is_printed_beside_a_bar_stays_on_stdout(terminal, capsys):
    with LiveView(), progress_bar():
        print("a result")
    printed = capsys.readouterr()
    assert printed.out == "a result\n" and "a result" not in printed.err
