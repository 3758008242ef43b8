"""Refuses `import actors`, `tune` or `cluster`: beside sdt_dist.actors it would be a second module with classes of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TOP = ("actors", "tune", "cluster")


class _Refusal(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in _TOP:
            raise ImportError(
                f"{fullname}: import sdt_dist.{fullname}, the one name of this module."
            )
        return None


def refuse_bare_names() -> None:
    """From now on, in this process; again is harmless."""
    if not any(isinstance(finder, _Refusal) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Refusal())
