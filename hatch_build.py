"""A build hook: refuses a checkout whose links to actors/, tune/ and cluster/ are files of text, as without symbolic links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LINKS = ("actors", "tune", "cluster")


class LinkedFolders(BuildHookInterface):
    """Ends a build with one message where sdt_dist/ would lack a folder; the package would be built without it in silence."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root) / "sdt_dist"
        lacking = [name for name in LINKS if not (package / name / "__init__.py").is_file()]
        if lacking:
            names = ", ".join(f"sdt_dist/{name}" for name in lacking)
            self.app.abort(
                f"sdt-dist: {names}: no folder of modules, allowed: a link to the folder of that name beside sdt_dist. "
                "This checkout has no symbolic links. Fix: `git config core.symlinks true` and `git checkout -- sdt_dist` "
                "(on Windows in developer mode), or install a wheel."
            )
