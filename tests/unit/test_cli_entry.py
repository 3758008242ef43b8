"""The ways into the command: `sdt --version`, `python -m sdt_dist`, and shell completion."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import sdt_dist

ROOT = Path(__file__).parents[2]


def _module(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sdt_dist", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | variables
    )


def test_the_version_is_the_package_s(sdt):
    assert sdt("--version") == (0, f"sdt {sdt_dist.__version__}\n", "")


def test_the_package_runs_as_the_command():
    shown = _module("--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (
        0,
        f"sdt {sdt_dist.__version__}\n",
        "",
    )
    wrong = _module("nope")
    assert wrong.returncode == 2 and wrong.stderr.startswith("Usage: sdt ")


@pytest.mark.parametrize(
    ("words", "place", "found"),
    [
        ("sdt ev", "1", ["evaluate"]),
        ("sdt forecast --hori", "2", ["--horizon"]),
        ("sdt cluster s", "2", ["submit", "status"]),
    ],
)
def test_a_shell_completes_commands_and_options(words, place, found):
    done = _module(_SDT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place)
    assert done.stdout.split() == found, done.stderr


def test_the_shell_s_script_calls_the_command():
    done = _module("--show-completion", "zsh", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (
        done.returncode == 0
        and done.stdout.startswith("#compdef sdt\n")
        and "_SDT_COMPLETE=complete_zsh" in done.stdout
    )


def test_the_help_names_the_options_before_a_command(sdt):
    code, out, _ = sdt("--help")
    head = out[out.index("Options:") : out.index("Commands:")]
    assert code == 0 and all(
        f"  --{name}" in head for name in ("version", "install-completion", "show-completion")
    )
    assert max(map(len, out.splitlines())) <= 80


def test_the_package_says_that_it_is_typed():
    assert files("sdt_dist").joinpath("py.typed").is_file()
