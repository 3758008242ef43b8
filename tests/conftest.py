"""Test-wide settings: no display, no hub, and `data` tests only where SDT_DATA_DIR points to the data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread: more than the free cores only wait for one another, and bits do not depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `data` tests when there is no data directory: they are not run, and not counted as skipped."""
    folder = os.environ.get("SDT_DATA_DIR")
    if folder and Path(folder).is_dir():
        return
    without = [item for item in items if item.get_closest_marker("data") is None]
    if len(without) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("data")])
        items[:] = without
