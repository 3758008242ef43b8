"""Files that are whole or not there: written beside their place, synced, renamed; and mappings of settings read from YAML.

It must not know what is in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdt_dist.errors import ConfigurationError, ResultsError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, sync it and rename it, so that `path` is never half written.

    Its folder is made where it is missing. ResultsError when the disk refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultsError(
            f"output: {path} cannot be written ({reason}); what was written before is kept. Free space and go on."
        ) from error


def write_text(path: Path, text: str) -> None:
    """`replace_file` with a text in UTF-8."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """The mapping of settings in a YAML file, its values unchecked; ConfigurationError names `kind` and the file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{kind}: {path} cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{kind}: {path} is not YAML in UTF-8 ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"{kind}: {path} holds {type(values).__name__}, allowed: a mapping of settings."
        )
    odd = [name for name in values if not isinstance(name, str)]
    if odd:
        raise ConfigurationError(
            f"{kind}: {path} has the setting {odd[0]!r}, allowed: names of settings."
        )
    return values
