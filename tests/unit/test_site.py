"""The site is true: its examples run, its commands parse, its links and the pages that code cites exist."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml

from sdt_dist.cluster.cli import app
from sdt_dist.rewards.spec import FORECAST_TERMS, FREE_TEXT_TERMS, TEXT_TERMS
from sdt_dist.search.methods import method_names
from tests.docs_helpers import (
    ROOT,
    anchors,
    blocks,
    commands,
    hook,
    markdown_files,
    pages,
    parse,
    run_page,
    same_output,
)

WRITTEN = ["README.md", *pages("", "tutorials", "guides", "results", "concepts", "reference")]
WITH_PYTHON = [
    page
    for page in pages("", "tutorials", "guides", "concepts")
    if any(block.kind == "python" for block in blocks(page))
]
WITH_CONSOLE = [page for page in WRITTEN if any(block.kind == "console" for block in blocks(page))]
WITH_SHELL = [page for page in WRITTEN if any(block.kind == "sh" for block in blocks(page))]
_CITED = re.compile(r"docs/[\w/-]+\.md(?:#[\w-]+)?")
_SOURCES = ("*.py", "*.sh", "*.yaml", "*.toml")
_FOLDERS = ("sdt_dist", "actors", "tune", "cluster", "benchmarks", "tests", "examples")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the root of a clone to examples: it has `examples/`, and may be written to."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("clone", "one_thread")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_examples_print_what_the_page_says(page: str) -> None:
    for said, printed in run_page(page, {}):
        assert same_output(said, printed), printed


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("page", WITH_CONSOLE)
def test_mistakes_get_the_message_that_the_page_shows(sdt, page: str) -> None:
    for block in (block for block in blocks(page) if block.kind == "console"):
        for part in block.text.removeprefix("$ ").split("\n$ "):
            line, _, said = part.partition("\n")
            (words,) = commands(line)
            code, _, err = sdt(*words[1:])
            assert code == 2
            assert err.strip() == said.strip()


@pytest.mark.parametrize("page", WITH_SHELL)
def test_commands_parse_and_what_they_name_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shell = [block.text for block in blocks(page) if block.kind == "sh"]
    for words in (words for text in shell for words in commands(text)):
        if words[0] == "sdt":
            parse(words[1:])
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words
        named = [word for word in words if word.startswith(("examples/", "cluster/"))]
        assert all((ROOT / name.partition(":")[0]).exists() for name in named), words


def test_a_wrong_option_would_be_found() -> None:
    for line in ("evaluate --rolouts 5", "tune --num-problems many", "cluster submit -- nothing"):
        with pytest.raises(Exception, match=r"No such option|valid integer|nothing"):
            parse(line.split())


def test_every_command_is_shown_somewhere() -> None:
    shell = [block.text for page in WITH_SHELL for block in blocks(page) if block.kind == "sh"]
    shown = {words[1] for text in shell for words in commands(text) if words[0] == "sdt"}
    assert {info.name for info in [*app.registered_commands, *app.registered_groups]} <= shown


@pytest.mark.parametrize("file", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_exist(file: Path) -> None:
    for target in hook("outside_pages").links(file.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path).resolve() if path else file
        assert place.exists(), f"{file}: {target}"
        assert not anchor or anchor in anchors(place), f"{file}: {target}"


def test_pages_that_code_cites_exist() -> None:
    files = [
        path for folder in _FOLDERS for kind in _SOURCES for path in (ROOT / folder).rglob(kind)
    ]
    cited = {
        (name, str(path.relative_to(ROOT)))
        for path in [*files, ROOT / "pyproject.toml", ROOT / "ray_cluster.yaml"]
        for name in _CITED.findall(path.read_text(encoding="utf-8"))
    }
    assert len(cited) > 100
    for name, source in cited:
        page, _, anchor = name.partition("#")
        assert (ROOT / page).is_file(), f"{source} cites {name}"
        assert not anchor or anchor in anchors(page), f"{source} cites {name}"


def test_every_page_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = list(_leaves(nav))
    own = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted([*own, *hook("outside_pages").PAGES])


def _leaves(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [leaf for one in inner for leaf in _leaves(one)]  # type: ignore[attr-defined]


def test_every_method_has_its_options_in_the_reference() -> None:
    text = hook("generate_reference").methods()
    assert all(f"### {name}\n" in text for name in (*method_names(), "s_adt"))


def test_links_between_pages_become_those_of_the_site() -> None:
    turn = hook("outside_pages").with_site_links
    page = "guides/rewards.md"
    assert turn("[a](evaluate.md#measures)", page) == "[a](evaluate.md#measures)"
    assert turn("[a](../../ARCHITECTURE.md)", page) == "[a](../architecture/index.md)"
    assert turn("[a](../../examples/load.csv)", page) == "a"
    assert turn("[a](docs/fan.png)", "architecture/index.md") == "[a](../fan.png)"
    assert (
        turn("`[a](x.md)`\n```text\n[a](x.md)\n```", page) == "`[a](x.md)`\n```text\n[a](x.md)\n```"
    )


def test_terms_and_options_of_rewards_are_those_that_exist() -> None:
    text = (ROOT / "docs/guides/rewards.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+)(?::[A-Z]+)?` \|([^|]*)\|", text, flags=re.MULTILINE)
    known = FORECAST_TERMS | TEXT_TERMS
    assert {name for name, _ in rows} == {*known, *FREE_TEXT_TERMS}
    for name, options in ((name, options) for name, options in rows if name in known):
        parameters = set(inspect.signature(known[name]).parameters) - {"history", "reference"}
        assert parameters <= set(re.findall(r"`([a-z]+)`", options)), name


def test_formats_of_files_are_those_of_the_code() -> None:
    text = (ROOT / "docs/reference/files.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(sdt-[a-z-]+/\d+)`", text))
    files = [
        path for folder in ("sdt_dist", "actors", "tune") for path in (ROOT / folder).rglob("*.py")
    ]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert named == set(re.findall(r"\"(sdt-[a-z-]+/\d+)\"", code))
