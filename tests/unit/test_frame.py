"""The frame: import time and weight, the command line's start, layers, and what the tree may not contain."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout


def test_importing_the_library_is_light() -> None:
    code = "import sys, json, sdt_dist; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(_python(code)))
    assert "sdt_dist" in loaded
    assert not loaded & {"torch", "ray", "numba", "transformers", "pandas", "matplotlib", "scipy"}


def test_import_takes_less_than_300_ms() -> None:
    """Of processor time, which other work on the machine does not change much."""
    code = "import time; t = time.process_time(); import sdt_dist; print(time.process_time() - t)"
    assert min(float(_python(code)) for _ in range(5)) < 0.3


@pytest.mark.parametrize("command", [[], ["evaluate"], ["forecast"], ["generate"]])
def test_help_answers_within_a_second(command: list[str]) -> None:
    """Of processor time, as above."""

    def run() -> float:
        begin = _children_s()
        done = subprocess.run(
            [sys.executable, "-m", "sdt_dist.cluster.cli", *command, "--help"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "Usage" in done.stdout
        return _children_s() - begin

    assert min(run() for _ in range(5)) < 1.0


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_layers_hold() -> None:
    tool = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([tool], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_search_code_never_imports_a_backend() -> None:
    code = "import sys, sdt_dist.search.api, sdt_dist.search.methods as m; m.method_names(); [m.get_method(n) for n in m.method_names()]; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert _python(code).split() == ["False", "False"]


def test_tree_holds_no_data_and_no_machine_paths() -> None:
    files = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    data = {name for name in files if name.endswith((".csv", ".pt", ".pkl", ".bin"))}
    assert data == {"examples/load.csv"}  # ours: examples/make_series.py writes it
    # the home of Ray's own images is no path of ours
    pattern = re.compile(r"/(?:work|root|home(?!/ray)|tmp)/\w")
    texts = [
        ROOT / name
        for name in files
        if name.endswith((".py", ".md", ".toml", ".yaml", ".json", ".ipynb", ".yml", ".cff"))
    ]
    assert not [str(path) for path in texts if path.exists() and pattern.search(path.read_text())]


def test_weights_are_part_of_the_package_and_small() -> None:
    folder = ROOT / "sdt_dist" / "models" / "forecaster" / "weights"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "forecaster.json", "MODEL_CARD.md"} <= names
    assert (folder / "model.safetensors").stat().st_size <= 10 * 2**20


def test_files_are_written_whole_by_one_helper() -> None:
    """`files.replace_file` alone renames; what writes itself appends lines, makes a token, or is within such a call."""
    by_hand = re.compile(
        r"os\.(?:replace|rename)\(|\.write_(?:text|bytes)\(|\.savefig\(|\.tmp\"|\.part\""
    )
    within = re.compile(r"replace_file\(|lambda \w+: \w+\.(?:write_(?:text|bytes)|savefig)\(")
    names = subprocess.run(
        ["git", "ls-files", "sdt_dist", "actors", "tune", "cluster"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout.split()
    found = []
    for name in names:
        path = ROOT / name
        if path.suffix != ".py" or name == "sdt_dist/files.py" or not path.is_file():
            continue
        lines = path.read_text().splitlines()
        found += [
            f"{name}: {line}" for line in lines if by_hand.search(line) and not within.search(line)
        ]
    assert sorted(line.partition(":")[0] for line in found) == [
        "actors/work.py",  # a reward's source in a temporary folder of its own
        "sdt_dist/training/flow/learner.py",  # what a killed writer left behind is no foreign file
        "tune/sweep.py",  # likewise
    ], found
