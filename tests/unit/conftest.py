"""The `sdt` command run in this process, for the tests of its commands."""

from __future__ import annotations

import sys

import pytest

from sdt_dist.cluster.cli import main


@pytest.fixture
def sdt(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sdt", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        printed = capsys.readouterr()
        return int(done.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def mistake(sdt):
    """Run a command that must end with exit code 2 and one line on stderr; returns the line."""

    def run(*arguments: object) -> str:
        code, _, err = sdt(*arguments)
        assert code == 2
        assert err.startswith("sdt: ") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def early_mistake(mistake):
    """A mistake that must be told before a model loads."""

    def run(*arguments: object) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "sdt_dist.models.loading.load_model",
                lambda *_, **__: pytest.fail("a model was loaded"),
            )
            return mistake(*arguments)

    return run
