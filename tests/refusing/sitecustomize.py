"""What Python imports at its start where this folder is on PYTHONPATH: bare names are refused as in the tests' own process."""

from __future__ import annotations

import runpy
from pathlib import Path

_FINDER = Path(__file__).parents[1] / "one_package.py"
runpy.run_path(str(_FINDER))["refuse_bare_names"]()
