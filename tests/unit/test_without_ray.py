"""`sdt evaluate` where Ray is not installed: the same results by this process, and a fleet is refused.

See docs/guides/evaluate.md. Whoever imports Ray here fails as where it is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation_helpers import evaluate_into

WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from sdt_dist.cluster.cli import main; main()"
ASKED = (
    "--methods",
    "snis,residual_ts",
    "--num-problems",
    "2",
    "--rollouts",
    "6",
    "--horizon",
    "8",
)
SETTINGS = {
    "methods": ["snis", "residual_ts"],
    "num_problems": 2,
    "num_rollouts": 6,
    "horizon": 8,
}


def _evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, "evaluate", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def _lines(directory: Path) -> dict[tuple[str, int], dict]:
    lines = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    return {
        (line["label"], line["problem"]): {k: v for k, v in line.items() if k != "wall_s"}
        for line in lines
    }


@pytest.mark.usefixtures("one_thread")
def test_this_process_searches_and_says_so(tmp_path):
    done = _evaluate(*ASKED, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("sdt: Ray is not installed, so")
    evaluate_into(tmp_path / "here", SETTINGS)
    have = _lines(tmp_path / "run")
    assert len(have) == 4 and have == _lines(tmp_path / "here")
    [environment] = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [server["count"] for server in environment["servers"]] == [None]


@pytest.mark.parametrize(
    "asked",
    [
        ("--address", "auto"),
        ("--servers", "2"),
        ("--searchers", "2"),
        ("--fleet", "fleet.yaml"),
    ],
)
def test_a_fleet_is_refused_with_what_to_install(early_mistake, monkeypatch, tmp_path, asked):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = early_mistake("evaluate", *ASKED, *asked, "--output", tmp_path / "run")
    assert line == f"sdt: {asked[0]} needs ray: pip install 'sdt-dist[cluster]'.\n"
    assert not (tmp_path / "run").exists()
