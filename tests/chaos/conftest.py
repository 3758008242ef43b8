"""The table of recovery times, printed when all kills are over."""

from __future__ import annotations

import pytest

from tests.chaos.killing import HEAD, Recovery
from tests.ray.conftest import local_ray  # noqa: F401 (a fixture)

_TABLE: list[Recovery] = []


@pytest.fixture
def table() -> list[Recovery]:
    """Where a test puts its row."""
    return _TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TABLE:
        terminalreporter.section("recovery")
        terminalreporter.write_line(HEAD)
        for row in _TABLE:
            terminalreporter.write_line(row.line())
