"""Fills the generated parts of the reference pages while the site is built (an MkDocs hook).

A page holds `<!-- generated: NAME -->`, and gets a table in its place: of the command tree, or of the configuration
models. `::: sdt_dist.NAME` becomes the place where that public name is defined, for mkdocstrings. So nothing generated
is committed. Outside a build, `filled(text)` gives the same text to the tests.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import sdt_dist
from sdt_dist.actors.config import FleetConfig, Placement, ServerGroup
from sdt_dist.cluster.cli import app
from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.search.methods import get_method, method_names
from sdt_dist.search.options import SearchOptions, TreeOptions, ValueTreeOptions
from sdt_dist.training.flow.config import TrainFlowConfig
from sdt_dist.tune.config import SweepConfig
from sdt_dist.tune.space import Range

_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", flags=re.MULTILINE)
_PUBLIC = re.compile(r"^::: sdt_dist\.(\w+)$", flags=re.MULTILINE)
_NOTE = re.compile(r"(?:^|\s\s)\[([^\]]*)\]$")  # as click ends an option's help
_MOST_KINDS = 3  # of a union that is spelt out
_SHARED: dict[type[BaseModel], str] = {
    SearchOptions: "every method",
    TreeOptions: "tree methods",
    ValueTreeOptions: "trees of value estimates",
}
_BOUNDS = {
    "ge": "≥",
    "gt": ">",
    "le": "≤",
    "lt": "<",
    "min_length": "entries ≥",
    "max_length": "entries ≤",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs asks for every page's text before it is rendered."""
    return filled(markdown)


def filled(markdown: str) -> str:
    """A page's text with its generated parts in place; KeyError for a part that is unknown."""
    with_parts = _MARK.sub(lambda match: _PARTS[match[1]](), markdown)
    return _PUBLIC.sub(lambda match: _place_of(match[1]), with_parts)


def _place_of(name: str) -> str:
    """The line by which mkdocstrings shows a name of the package, from where it is defined."""
    module = sdt_dist._LAZY.get(name)
    return f"::: sdt_dist.{name}" if module is None else f"::: {module}.{name}"


# --- the command line


def commands() -> str:
    """Every command: what it does, its examples, its arguments and options."""
    root = typer.main.get_command(app)
    context = root.make_context("sdt", [], resilient_parsing=True)
    return "\n\n".join(_group(root, context, level=2))


def _group(group: Any, context: Any, level: int) -> Iterator[str]:
    for name, command in group.commands.items():
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        yield f"{'#' * level} {inner.command_path}"
        yield _prose(command.help or "")
        if hasattr(command, "commands"):
            yield from _group(command, inner, level + 1)
        else:
            yield _parameters(command, inner)


def _prose(text: str) -> str:
    """A command's help, its examples as one block of code."""
    paragraphs = [
        paragraph
        for paragraph in text.split("\n\n")
        if paragraph.strip() not in ("Example:", "Examples:")
    ]
    examples = [paragraph.strip() for paragraph in paragraphs if paragraph.startswith("  ")]
    words = [_escaped(paragraph) for paragraph in paragraphs if not paragraph.startswith("  ")]
    code = ["```sh\n" + "\n".join(examples) + "\n```"] if examples else []
    return "\n\n".join([*words[:1], *code, *words[1:]])


def _parameters(command: Any, context: Any) -> str:
    """The table of a command's arguments and options, from its own help."""
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            name, text = record
            note = _NOTE.search(text)
            rows.append(
                [
                    f"`{name}`",
                    _NOTE.sub("", text),
                    note[1].removeprefix("default: ") if note else "",
                ]
            )
    return _table(["argument or option", "what it is", "default; allowed"], rows)


# --- configuration


def _model(model: type[BaseModel], without: Iterable[type[BaseModel]] = ()) -> str:
    """The table of a configuration model's fields, but those of the models in `without`."""
    known = {name for other in without for name in other.model_fields}
    rows = [
        [
            f"`{name}`",
            _type(field.annotation),
            _default(field),
            _allowed(field),
            field.description or "",
        ]
        for name, field in model.model_fields.items()
        if name not in known
    ]
    return _table(["field", "type", "default", "allowed", "what it is"], rows)


def _described(model: type[BaseModel], without: Iterable[type[BaseModel]] = ()) -> str:
    """What a configuration model says of itself, and the table of its fields."""
    return f"{_escaped(inspect.cleandoc(model.__doc__ or ''))}\n\n{_model(model, without)}"


def methods() -> str:
    """The options of every search method: those that many share, then each method's own."""
    parts = []
    models = list(_SHARED)
    for number, model in enumerate(models):
        parts += [f"### Options of {_SHARED[model]}", _described(model, models[:number])]
    for name in (*method_names(), "s_adt"):
        options = get_method(name).options
        shared = next(
            title for model, title in reversed(_SHARED.items()) if issubclass(options, model)
        )
        has_own = options not in _SHARED
        parts += [f"### {name}", f"The options of {shared}{', and:' if has_own else '.'}"]
        parts += [_model(options, models)] if has_own else []
    return "\n\n".join(parts)


def _type(annotation: Any) -> str:
    """A type as people write it in YAML terms: `whole number`, `number`, `text`, `true or false`, or choices."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, UnionType):
        return "any value" if len(inner) > _MOST_KINDS else " or ".join(_type(one) for one in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"mapping of {_type(inner[0])} to {_type(inner[1])}"
    if origin is not None:
        return _type(inner[0])
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        NoneType: "null",
        Any: "any",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return f"`{json.dumps(plain, ensure_ascii=False)}`"


def _allowed(field: FieldInfo) -> str:
    """The bounds of a field's value."""
    found = [
        f"{sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(bound, name, None) is not None
    ]
    return ", ".join(found)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [
        titles,
        ["---"] * len(titles),
        *([_escaped(cell).replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text in which Markdown sees no tags and no emphasis, code left as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", part) for part in parts
    )


def quickstart() -> str:
    """The table of results that the README shows."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## What comes out") :]
    return section[section.index("```text") : section.index("```\n\n") + 3]


_PARTS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "commands": commands,
    "evaluation": lambda: _model(EvaluationConfig),
    "evaluation-method": lambda: _described(MethodConfig),
    "methods": methods,
    "fleet": lambda: _model(FleetConfig),
    "placement": lambda: _model(Placement),
    "server-group": lambda: _model(ServerGroup),
    "sweep": lambda: _model(SweepConfig),
    "range": lambda: _model(Range),
    "train-flow": lambda: _described(TrainFlowConfig),
}
