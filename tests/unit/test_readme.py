"""The README is short and true: its example prints what it says, what it names exists."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sdt_dist.cluster.cli import app
from sdt_dist.search.methods import method_names
from tests.docs_helpers import ROOT, blocks, run_page, same_output

README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS = 900


@pytest.mark.usefixtures("one_thread")
def test_the_seven_lines_print_what_they_say() -> None:
    (code,) = [block.text for block in blocks("README.md") if block.kind == "python"]
    assert len(code.splitlines()) == 7
    scope: dict = {}
    ((said, printed),) = run_page("README.md", scope)
    assert same_output(said, printed), printed
    assert scope["paths"].shape == (8, 48)
    assert np.isfinite(scope["result"].log_z_error)


def test_it_is_at_most_900_words() -> None:
    assert len(README.split()) <= MOST_WORDS


def test_methods_and_the_commands_of_a_newcomer_are_named() -> None:
    assert all(f"`{name}`" in README for name in (*method_names(), "s_adt"))
    named = set(re.findall(r"\bsdt ([a-z-]+)", README))
    commands = {info.name for info in [*app.registered_commands, *app.registered_groups]}
    assert {"forecast", "generate", "evaluate"} <= named <= commands


def test_targets_that_set_themselves_up_are_named_and_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("evaluate", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}: install$", makefile, flags=re.MULTILINE)
