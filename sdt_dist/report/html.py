"""A report's sections as one HTML page that needs no network: pictures, styles and scripts are in it.

It must not know where the numbers come from.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from sdt_dist.report.blocks import Section

_PAGE = Path(__file__).parent / "page"


def to_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The text of report.html; pictures are read from their .svg files."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": _prose, "data_uri": _data_uri}
    return environment.get_template("page.html.j2").render(
        title=title, subtitle=subtitle, sections=sections
    )


def _prose(text: str) -> Markup:
    """Escaped text, with `...` as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _data_uri(stem: Path) -> str:
    content = base64.b64encode(stem.with_name(stem.name + ".svg").read_bytes()).decode("ascii")
    return f"data:image/svg+xml;base64,{content}"
