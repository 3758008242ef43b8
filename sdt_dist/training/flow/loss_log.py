"""The losses of a training as JSON lines, one a step: appended while it runs, cut back to a saved step when it goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from sdt_dist.errors import ResultsError
from sdt_dist.files import replace_file

Line = dict[str, Any]


class LossLog:
    """Lines of a file, of which only those up to `step` are kept when it is opened. ResultsError when the disk refuses."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._handle: IO[str] | None = None
        if path.exists():
            kept = [json.dumps(line) + "\n" for line in read_losses(path) if line["step"] <= step]
            replace_file(path, lambda target: target.write_text("".join(kept), encoding="utf-8"))

    def append(self, line: Line) -> None:
        """Add a line; a kill of this process keeps it."""
        try:
            if self._handle is None:
                self._handle = self.path.open("a", encoding="utf-8")
            self._handle.write(json.dumps(line) + "\n")
            self._handle.flush()
        except OSError as error:
            raise _refused(self.path, error) from error

    def sync(self) -> None:
        """Let what was added outlive the machine."""
        if self._handle is None:
            return
        try:
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise _refused(self.path, error) from error

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def read_losses(path: Path) -> list[Line]:
    """The whole lines of a file; a torn or foreign one ends it."""
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            break
        lines.append(line)
    return lines


def _refused(path: Path, error: OSError) -> ResultsError:
    return ResultsError(
        f"output: {path} cannot be written ({error.strerror}); free space and go on with --resume."
    )
