"""Ray's token authentication as this host has it: the mode, and where a token would come from, never the token itself.

It must not print, log or return a token.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True)
class AuthState:
    """`mode` is RAY_AUTH_MODE ("unset" without it); `source` says where a token is, None when there is none."""

    mode: str
    source: str | None
    file: Path | None = None

    @property
    def usable(self) -> bool:
        """Whether a cluster with token authentication would let this process in, as far as can be seen from here."""
        return self.mode == "token" and self.source is not None

    @property
    def exposed(self) -> bool:
        """Whether other users of this host may read the token file."""
        return self.file is not None and bool(
            self.file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        )


def auth_state() -> AuthState:
    """The state of this process, in Ray's own order: variable, file that a variable names, ~/.ray/auth_token."""
    mode = os.environ.get(MODE, "").lower() or "unset"
    if os.environ.get(TOKEN):
        return AuthState(mode, TOKEN)
    file = Path(os.environ[TOKEN_PATH]) if os.environ.get(TOKEN_PATH) else default_token_file()
    return AuthState(mode, str(file), file) if file.is_file() else AuthState(mode, None)


def default_token_file() -> Path:
    """Where Ray keeps the token of this user."""
    return Path.home() / ".ray" / "auth_token"


def use_token() -> None:
    """Send the token from now on, as Ray itself does for `auto`, unless RAY_AUTH_MODE says otherwise."""
    if os.environ.get(MODE):
        return
    os.environ[MODE] = "token"
    if "ray" in sys.modules:  # it has read the variable already
        from ray._raylet import Config

        Config.initialize("")


def create_private_token() -> None:
    """A token that only this user can read, where there is none: Ray would create one that every user can read."""
    if auth_state().source is not None or os.environ.get(TOKEN_PATH):
        return
    file = default_token_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:  # another process was faster
        return
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))
