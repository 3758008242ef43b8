"""A user's reward function from a Python file that the user named: the only place where such a file runs."""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdt_dist.errors import ConfigurationError


def load_function(path: Path, name: str) -> Callable[..., Any]:
    """The function `name` of a file, which is run for it.

    ConfigurationError when there is no such file or function, and, with the line, for whatever the file raises.
    """
    if not path.is_file():
        raise ConfigurationError(
            f"reward: file {str(path)!r} does not exist (path.py:function stands alone, without factor or sum)."
        )
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (
        Exception,
        SystemExit,
    ) as error:  # a user's file may raise anything, and ends no process
        reason = " ".join(str(error).split())
        place = f"{path}{_line(error, str(module_spec.origin))}"
        raise ConfigurationError(f"reward: {place}: {type(error).__name__}: {reason}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigurationError(
            f"reward: {path} has no function {name!r}, allowed: {', '.join(own) or 'none'}."
        )
    return function


def wants_context(function: Callable[..., Any]) -> bool:
    """Whether a function takes `context`; builtins without a signature do not."""
    try:
        return "context" in inspect.signature(function).parameters
    except ValueError:
        return False


def _line(error: BaseException, file: str) -> str:
    """', line n' where the file itself is to blame: its syntax, or its innermost line that ran."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    return f", line {lines[-1]}" if lines else ""
