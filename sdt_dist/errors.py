"""The one exception family of the project: every error names a field, a value, what is allowed and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SdtError(Exception):
    """Base of every error that the project raises on purpose; the command line ends with exit code 2 on it."""


class ConfigurationError(SdtError, ValueError):
    """A setting, argument or configuration key is unknown, of the wrong type, out of range or contradictory."""


class ContextError(SdtError, ValueError):
    """A prompt or history cannot be used: empty, too long, too short, not finite, or constant."""


class RewardError(SdtError, ValueError):
    """A reward returned the wrong shape, NaN or infinity, or was given what it cannot score."""


class DataError(SdtError, ValueError):
    """A data file is missing, lacks a column, or holds values that cannot be used."""


class CheckpointError(SdtError, ValueError):
    """A checkpoint is corrupt, foreign to this configuration, or in a format that is refused (pickle)."""


class MissingExtraError(SdtError, ImportError):
    """An optional dependency is needed; the message names the `pip install` that brings it."""


class ResultsError(SdtError, RuntimeError):
    """An output directory cannot be used: another configuration's results, not writable, or disk full."""


class FleetError(SdtError, RuntimeError):
    """A fleet cannot go on: no cluster, actors that do not start or keep dying, a wait that reached its deadline."""


class ModelGoneError(FleetError):
    """A model's own process has ended: it answers nothing any more and has to be loaded again."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigurationError:
    """The error for a name that no registry holds, with the closest known names as a suggestion."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ConfigurationError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages of our own."""
    return next(iter(str(error).splitlines()), type(error).__name__)
