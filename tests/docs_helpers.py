"""Reading the project's Markdown for tests: blocks of code, commands, links and anchors."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import typer

from sdt_dist.cluster.cli import app

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page: its language and its text."""

    kind: str
    text: str


@cache
def hook(name: str) -> ModuleType:
    """A module of docs/ that MkDocs runs while it builds the site."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def markdown_files() -> list[Path]:
    """Every Markdown file of the repository."""
    folders = [ROOT / "docs", ROOT / "sdt_dist" / "models", ROOT / "sdt_dist" / "flow"]
    below = [path for folder in folders for path in folder.rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), *below])


def pages(*folders: str) -> list[str]:
    """The Markdown files of these folders of docs/, by their place in the repository."""
    found = [path for folder in folders for path in (ROOT / "docs" / folder).glob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def text_of(page: str | Path) -> str:
    """A page's text as the site has it, generated parts in place."""
    return hook("generate_reference").filled((ROOT / page).read_text(encoding="utf-8"))


def blocks(page: str | Path) -> list[Block]:
    """A page's fenced blocks, in order, those of generated parts too."""
    return [Block(kind, body) for kind, body in _FENCE.findall(text_of(page))]


def anchors(page: str | Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    prose = _FENCE.sub("", text_of(page))
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE):
        found.add(_unique(_slug(heading), found))
    return found


def _slug(heading: str) -> str:
    """Markdown's own rule: what is no letter, digit, underscore or hyphen goes, blanks become hyphens."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*\\]", r"\1", heading)
    ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^\w\s-]", "", ascii_only).strip().lower()
    return re.sub(r"[-\s]+", "-", kept)


def _unique(slug: str, taken: set[str]) -> str:
    number = 0
    found = slug
    while found in taken:
        number += 1
        found = f"{slug}_{number}"
    return found


def run_page(page: str, scope: dict) -> list[tuple[str, str]]:
    """Run a page's Python blocks in one namespace; (what the page says is printed, what was), one a block that prints."""
    found = []
    printed = ""
    for block in blocks(page):
        if block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(block.text, scope)
            printed = out.getvalue()
        elif block.kind == "text" and printed:
            found.append((block.text, printed))
            printed = ""
    assert not printed, f"{page}: output without a block of text: {printed}"
    return found


def same_output(said: str, printed: str) -> bool:
    """Whether two texts are the same but for numbers, which may differ as draws on another processor do."""
    if _NUMBER.sub("0", said) != _NUMBER.sub("0", printed):
        return False
    pairs = zip(_NUMBER.findall(said), _NUMBER.findall(printed), strict=True)
    return all(abs(float(a) - float(b)) <= 0.05 + 0.2 * abs(float(a)) for a, b in pairs)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of shell, as words, variables before them and comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word not in ("&&", "&", "|"):
                command.append(word)
                continue
            start = next((i for i, w in enumerate(command) if not _ASSIGNMENT.fullmatch(w)), 0)
            if command[start:]:
                yield command[start:]
            command = []


def parse(words: list[str]) -> None:
    """Parse the arguments of `sdt` without running anything; whatever the command line raises for what it has not."""
    command = typer.main.get_command(app)
    if words[0].startswith("--"):
        known = {option for parameter in command.params for option in parameter.opts}
        assert words[0] in known, f"sdt {words[0]}: no such option"
        return
    context = command.make_context("sdt", [], resilient_parsing=True)
    rest = list(words)
    while hasattr(command, "commands"):
        name = rest.pop(0)
        command = command.commands[name]
        is_group = hasattr(command, "commands")
        arguments = [] if is_group else list(rest)
        context = command.make_context(name, arguments, parent=context, resilient_parsing=is_group)
    if words[:2] == ["cluster", "submit"]:
        parse(words[words.index("--") + 1 :])
