"""The README is true: its Python example runs, its commands and reward names exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from sdt_dist.cluster.cli import app
from sdt_dist.rewards.spec import FORECAST_TERMS, TEXT_TERMS
from sdt_dist.search.methods import method_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    assert scope["paths"].shape == (8, 48)
    assert np.isfinite(scope["result"].log_z_error)
    assert scope["result"].rollouts == 100


def test_every_command_and_method_is_named() -> None:
    commands = {info.name for info in [*app.registered_commands, *app.registered_groups]}
    assert set(re.findall(r"^    sdt ([a-z-]+)", README, flags=re.MULTILINE)) == commands
    assert all(f"`{name}`" in README for name in method_names())


def test_reward_names_in_the_readme_exist() -> None:
    line = README[README.index("REWARD SPEC:") :].split("\n\n")[0]
    terms = set(
        re.findall(
            r"`(?:[\d.]+\*)?([a-z_]+)(?::[^`]*)?`",
            line.replace("spectral:gamma=1+0.5*nonneg", "spectral`, `nonneg"),
        )
    )
    assert {"spectral", "nonneg", "bounds", "regex"} <= terms
    assert terms <= {*FORECAST_TERMS, *TEXT_TERMS, "regex", "answer", "reward_model"}


def test_the_readme_has_no_gaps() -> None:
    assert "@@" not in README
    assert all((ROOT / target).exists() for target in re.findall(r"\]\(((?!http)[^)]+)\)", README))
