"""Refuses `import actors`, `tune` or `cluster`: beside sdt_dist.actors it would be a second module with classes of its own.

In this process, and through refusing/sitecustomize.py in those that inherit its environment, Ray's workers included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

TOP = ("actors", "tune", "cluster")
REFUSING = Path(__file__).parent / "refusing"  # on PYTHONPATH, it refuses in a new process


class _Refusal(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in TOP:
            raise ImportError(
                f"{fullname}: import sdt_dist.{fullname}, the one name of this module."
            )
        return None


def refuse_bare_names() -> None:
    """From now on, in this process; again is harmless."""
    if not any(isinstance(finder, _Refusal) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Refusal())


def refuse_in_new_processes() -> None:
    """From now on, in every Python process that is started with this one's environment."""
    os.environ["PYTHONPATH"] = python_path(*os.environ.get("PYTHONPATH", "").split(os.pathsep))


def python_path(*folders: str | Path) -> str:
    """PYTHONPATH of a new process: `folders`, and what refuses bare names there."""
    kept = [str(folder) for folder in folders if str(folder) not in ("", str(REFUSING))]
    return os.pathsep.join([str(REFUSING), *kept])
