"""Bars and notes of a run under way go to stderr, so that stdout holds a command's results alone."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def note_console() -> Console:
    """A console on stderr."""
    return Console(stderr=True)


def progress_bar(*columns: ProgressColumn | str, console: Console | None = None) -> Progress:
    """A bar on stderr with these columns, rich's own by default; what is printed meanwhile stays on stdout.

    There is none where stderr is no terminal: a file would keep its last frame only. Notes are written there as well.
    """
    console = console or note_console()
    return Progress(
        *columns, console=console, redirect_stdout=False, disable=not console.is_terminal
    )
