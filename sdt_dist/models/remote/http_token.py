"""Where the HTTP model server's bearer token comes from; nothing here prints or logs it.

See docs/architecture/fleet.md.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.remote.http_api import TOKEN_VARIABLE, check_token


def client_token() -> str:
    """The token of the environment; ConfigurationError when there is none."""
    given = os.environ.get(TOKEN_VARIABLE)
    if not given:
        raise ConfigurationError(
            f"{TOKEN_VARIABLE}: not set; allowed: the token of the model server, e.g. "
            f"`export {TOKEN_VARIABLE}=$(cat TOKEN_FILE)` with the file that `sdt serve` names when it starts."
        )
    return check_token(given.strip(), TOKEN_VARIABLE)


def server_token(file: Path | None, default_file: Path) -> tuple[str, str]:
    """(token, where it is): of `file`, else of the environment, else of `default_file`.

    A file that does not exist is made, with a new token that only its owner can read. ConfigurationError for a file
    that others can read, and for what is no token.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if file is None and given:
        return check_token(
            given.strip(), TOKEN_VARIABLE
        ), f"the environment variable {TOKEN_VARIABLE}"
    path = (file or default_file).expanduser()
    try:
        if not path.exists():
            _make(path)
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigurationError(
                f"token file: {path} can be read by others; allowed: mode 0600 (`chmod 600 {path}`)."
            )
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"token file: {path} cannot be used ({error}); give another with --token-file."
        ) from error
    return check_token(token, f"token file {path}"), str(path)


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32) + "\n")
