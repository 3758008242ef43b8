"""One name for every module: bare `actors`, `tune` and `cluster` are refused wherever code runs, and stand in no text."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.one_package import TOP

ROOT = Path(__file__).parents[2]
NAMES = "|".join(TOP)
ENDINGS = "py|yaml|yml|json|jsonl|md|html|png|pdf|csv|toml|sh"
BARE = re.compile(
    rf"-m\s+(?:{NAMES})\b(?![/-])"  # python -m cluster.cli
    rf"|\bfrom\s+(?:{NAMES})(?:\.\w+)*\s+import\b"
    rf"|(?:^|[;\"'`(])\s*import\s+(?:{NAMES})\b"
    rf"|[\"'](?:{NAMES})(?!\.(?:{ENDINGS})[\"'])(?:\.[a-z_]\w*)+[\"':]",  # a module in a string: "cluster.cli:main"
    re.MULTILINE,
)
OF_THE_REFUSAL = {"tests/one_package.py", "tests/unit/test_one_package.py"}


@pytest.mark.parametrize("name", TOP)
def test_a_bare_name_is_refused_here(name):
    with pytest.raises(ImportError, match=rf"{name}: import sdt_dist\.{name}"):
        importlib.import_module(name)


@pytest.mark.parametrize("arguments", [["-c", "import cluster"], ["-m", "cluster.cli"]])
def test_a_bare_name_is_refused_in_a_new_process(arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "import sdt_dist.cluster" in done.stderr


def test_rays_own_packages_and_ours_are_let_through():
    for name in ("sdt_dist.cluster", "sdt_dist.actors.config", "ray.tune"):
        assert importlib.util.find_spec(name) is not None


@pytest.mark.parametrize(
    "text",
    ["python -m cluster.cli evaluate", "from actors.remote import x", "x; import tune", '"tune.heldout"', "'cluster.cli:main'",
     "import actors.fleet", "`import cluster`"],
)  # fmt: skip
def test_the_pattern_sees_bare_names(text):
    assert BARE.search(text)


@pytest.mark.parametrize(
    "text",
    ["python -m sdt_dist.cluster.cli", "from ray import tune as ray_tune", "from sdt_dist.actors.fleet import ask",
     '"sdt_dist.tune.heldout"', "'tune.yaml'", '"cluster.md"', "cluster/nodes/start_head.sh", "-m cluster/x", "cluster.shutdown()"],
)  # fmt: skip
def test_the_pattern_lets_others_be(text):
    assert not BARE.search(text)


def test_no_text_of_the_tree_names_a_module_by_its_bare_name():
    """Strings, commands, YAML, Markdown and the Makefile: what the linter's ban on imports does not read."""
    files = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.splitlines()
    found = []
    for name in set(files) - OF_THE_REFUSAL:
        path = ROOT / name
        if not path.is_file() or path.suffix in (".safetensors", ".png", ".npz"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [f"{name}: {match.group()}" for match in BARE.finditer(text)]
    assert not found
