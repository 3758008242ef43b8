"""Our figures leave matplotlib's backend to the user: no module of ours chooses one, or loads pyplot, which does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BACKEND = "svg"  # none that we would choose
SCRIPT = """
import sys
from importlib import import_module
from pathlib import Path

import matplotlib

folder, backend, *modules = sys.argv[1:]
matplotlib.use(backend)
for module in modules:
    import_module(module)

from sdt_dist.report.figures.files import draw
from sdt_dist.report.figures.tree import draw_value_error

curve = {0: 1.0, 1: 0.5}
(path,) = draw({"error": lambda: draw_value_error({"dts": curve})}, Path(folder), [".png"])
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules, path.read_bytes()[1:4].decode())
"""


def _figure_modules() -> list[str]:
    """Modules of ours whose source names matplotlib; os.walk, as rglob follows no links."""
    folders = os.walk(ROOT / "sdt_dist", followlinks=True)
    files = [Path(folder) / name for folder, _, names in folders for name in names]
    found = [path for path in files if path.suffix == ".py" and "matplotlib" in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def test_importing_and_drawing_figures_leaves_the_backend_alone(tmp_path: Path) -> None:
    modules = _figure_modules()
    assert "sdt_dist.tune.figures" in modules and len(modules) >= 8
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), BACKEND, *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [BACKEND, "False", "PNG"]
