"""Pages of the site whose files lie elsewhere in the repository, and the links between them (an MkDocs hook).

Every Markdown file links to others by its own place in the repository, so that links work without the site too. Here they
become the site's. A link to a file that is no page (code, an example) keeps its text only.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "architecture/index.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "reference/forecaster-card.md": "sdt_dist/models/forecaster/weights/MODEL_CARD.md",
    "reference/flow-card.md": "sdt_dist/flow/weights/MODEL_CARD.md",
}
_HOME = {"README.md": "index.md"}
_CODE = r"```.*?^\s*```|^(?: {4}|\t).*?$|`[^`\n]*`"
_LINK = r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)"
_LINKS = re.compile(f"{_LINK}|{_CODE}", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks for the site's files: those that lie outside its folder are added."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs asks for every page's text before it is rendered."""
    return with_site_links(markdown, page.file.src_uri)


def source_of(page: str) -> str:
    """The file in the repository that a page of the site is made from."""
    return PAGES.get(page, f"docs/{page}")


def links(markdown: str) -> Iterator[str]:
    """The targets of a text's links and images, those in code left out."""
    return (match["target"] for match in _LINKS.finditer(markdown) if match["target"])


def with_site_links(markdown: str, page: str) -> str:
    """The text with links to files of the repository turned into links between pages of the site."""
    return _LINKS.sub(lambda match: _site_link(match, page), markdown)


def _site_link(match: re.Match[str], page: str) -> str:
    target, text = match["target"], match["text"]
    if target is None or re.match(r"[a-z]+:|#", target):
        return match[0]
    path, hash_sign, anchor = target.partition("#")
    place = _page_at(posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), path)))
    if place is None:
        return text
    relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
    return f"{match['image']}[{text}]({relative}{hash_sign}{anchor})"


def _page_at(path: str) -> str | None:
    """The page, or image, of the site for a file of the repository; None where there is none."""
    by_source = _HOME | {source: page for page, source in PAGES.items()}
    if path in by_source:
        return by_source[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None
