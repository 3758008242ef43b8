"""`sdt tune` before anything starts: its plan, and one line and exit code 2 for a mistake.

See docs/guides/sweeps.md, docs/reference/cli.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

SWEEP = {
    "methods": ["snis"],
    "space": {"inverse_temperature": [1.0, 3.0]},
    "evaluation": {"num_problems": 2, "horizon": 8},
}


def _sweep(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(SWEEP | changes))
    return path


def test_a_sweep_is_planned_without_starting_anything(sdt, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sdt_dist.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    path = _sweep(tmp_path / "sweep.yaml")
    output = tmp_path / "sweep"
    code, out, _ = sdt(
        "tune", path, "--rungs", "4,8", "--num-trials", 3, "--output", output, "--dry-run"
    )
    assert code == 0 and not output.exists()
    assert "plan: 3 trials, stopped early by ASHA, of 2 problems each at 4 then 8 rollouts" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rungs", "8,4"], ["rungs: [8, 4]", "rise"]),
        (["--rungs", "a"], ["--rungs: 'a'"]),
        (["--objectives", "crps,nfe"], ["nfe", "sweep rollouts"]),
        (["--methods", "dst"], ["dst", "Did you mean 'dts'"]),
        (["--dataset", "clasic"], ["clasic", "Did you mean 'classic'"]),
        (["--screen", "nowhere"], ["screen: nowhere", "keep_evidence: true"]),
        (["--wandb", "project"], ["wandb", "pip install wandb"]),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_anything_starts(
    early_mistake, tmp_path, arguments, words
):
    err = early_mistake(
        "tune", _sweep(tmp_path / "sweep.yaml"), "--output", tmp_path / "sweep", *arguments
    )
    assert all(word in err for word in words), err
    assert not (tmp_path / "sweep").exists()


def test_a_sweeps_directory_takes_no_other_sweep_and_resuming_needs_one(early_mistake, tmp_path):
    assert "give SWEEP.yaml, or --resume" in early_mistake(
        "tune", "--resume", "--output", tmp_path / "absent"
    )
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    path = _sweep(tmp_path / "sweep.yaml")
    assert "holds no sweep but is not empty" in early_mistake("tune", path, "--output", folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(SWEEP))
    assert "already holds this sweep; add --resume" in early_mistake(
        "tune", path, "--output", folder
    )
    other = _sweep(tmp_path / "other.yaml", num_trials=7)
    assert "another configuration (num_trials: 20, now 7)" in early_mistake(
        "tune", other, "--resume", "--output", folder
    )


def test_a_report_of_a_sweeps_directory_points_to_the_sweeps_own(early_mistake, tmp_path):
    (tmp_path / "trials.jsonl").touch()
    assert f"report is {tmp_path / 'sweep.html'}" in early_mistake("report", tmp_path)
