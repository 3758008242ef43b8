"""Packages that an extra of sdt-dist brings: imported when they are needed, and one message where one is missing.

It must not import any of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from sdt_dist.errors import MissingExtraError


def missing_extra(who: str, package: str, extra: str) -> MissingExtraError:
    """The error for a package that cannot be imported: who needs it, and the `pip install` that brings it."""
    return MissingExtraError(f"{who} needs {package}: pip install 'sdt-dist[{extra}]'.")


def check_package(package: str, extra: str, who: str) -> None:
    """MissingExtraError where a package that `extra` brings is not installed; it is looked for, not imported."""
    if importlib.util.find_spec(package) is None:
        raise missing_extra(who, package, extra)


@contextmanager
def packages_of(extra: str, who: str) -> Iterator[None]:
    """For imports of packages that `extra` brings: MissingExtraError names the first that cannot be imported, and who needs it."""
    try:
        yield
    except MissingExtraError:
        raise
    except ImportError as error:
        raise missing_extra(who, _package(error), extra) from error


def _package(error: ImportError) -> str:
    """What is missing: the top-level module, or what the package says that was found and could not be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    return f"packages that are not there ({' '.join(str(error).split())})"
