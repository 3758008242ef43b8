"""Published versions of a flow below a directory: versions/000001, ..., each whole from the moment it has its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sdt_dist.errors import CheckpointError, ResultsError
from sdt_dist.flow.checkpoint import load_flow

VERSIONS = "versions"


def latest_version(directory: Path) -> tuple[int, Path] | None:
    """(number, path) of the highest whole version below a learner's directory, None where there is none."""
    for number, path in reversed(_versions(directory)):
        try:
            load_flow(path)
        except CheckpointError:
            continue
        return number, path
    return None


def place_version(directory: Path, number: int, write: Callable[[Path], None], keep: int) -> Path:
    """Let `write` fill a directory beside versions/NNNNNN and rename it there; only the last `keep` versions stay.

    ResultsError when the disk refuses.
    """
    target = directory / VERSIONS / f"{number:06d}"
    try:
        for leftover in (directory / VERSIONS).glob(".*"):
            shutil.rmtree(leftover)
        fresh = target.with_name(f".new-{target.name}")
        write(fresh)
        if target.exists():
            _remove(target)
        fresh.rename(target)
        for _, path in _versions(directory)[:-keep]:
            _remove(path)
    except OSError as error:
        raise ResultsError(
            f"output: {target} cannot be written ({error.strerror}); free space and go on."
        ) from error
    return target


def _remove(path: Path) -> None:
    """Take a version away at once, then delete its files."""
    old = path.with_name(f".old-{path.name}")
    path.rename(old)
    shutil.rmtree(old)


def _versions(directory: Path) -> list[tuple[int, Path]]:
    found = [
        p
        for p in (directory / VERSIONS).glob("*")
        if p.is_dir() and len(p.name) == 6 and p.name.isdecimal()
    ]
    return sorted((int(path.name), path) for path in found)
