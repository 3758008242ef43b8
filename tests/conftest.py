"""Test-wide settings: no display, no hub, `data`, `mlx` and `vllm` tests only where those are, `chaos` tests on demand."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.one_package import refuse_bare_names, refuse_in_new_processes

refuse_bare_names()
refuse_in_new_processes()
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# long tests, and kernels compiled before Ray's processes need them
_FIRST = (
    "property",
    "ray",
    "conformance",
)
# whose runs use the Ray of their process, where there is one
_ONE_RAY = (
    "tests/ray/",
    "tests/unit/test_cli.py",
)
_PACKAGES = {"mlx": "mlx_lm", "vllm": "vllm"}
collect_ignore = [] if importlib.util.find_spec("vllm") else ["vllm"]  # it imports vLLM


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread: more than the free cores only wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `data` tests without a data directory, those of a package that is absent, and `chaos` tests unless -m names them.

    They count as not run.
    """
    folder = os.environ.get("SDT_DATA_DIR")
    unwanted = [] if folder and Path(folder).is_dir() else ["data"]
    unwanted += [] if "chaos" in config.option.markexpr else ["chaos"]
    unwanted += [
        name for name, package in _PACKAGES.items() if not importlib.util.find_spec(package)
    ]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in unwanted)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if hasattr(config, "workerinput"):
        items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    folder = item.path.parent.name
    return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2 --dist loadfile`: a file goes to one worker, and all that start Ray to one, so that there is one Ray."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(_ONE_RAY) else super()._split_scope(nodeid)

    return OneRay(config, log) if config.getoption("dist") == "loadfile" else None
