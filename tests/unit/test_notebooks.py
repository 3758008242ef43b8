"""The notebooks are committed without outputs, and run from top to bottom where they lie."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, NotebookNode]:
    """Every notebook as it is after a run in a kernel of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)  # so that figures are shown in the notebook
        patch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, without ipywidgets
        return {name: _run(name) for name in NAMES}


def _run(name: str) -> NotebookNode:
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    return NotebookClient(book, timeout=200, kernel_name="python3", resources=resources).execute()


def _outputs(book: NotebookNode) -> list[NotebookNode]:
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def _kinds(book: NotebookNode) -> list[str]:
    return [kind for output in _outputs(book) for kind in output.get("data", {})]


def _printed(book: NotebookNode) -> str:
    return "".join(output.text for output in _outputs(book) if output.output_type == "stream")


def test_there_are_two():
    assert NAMES == ["forecast", "text"]


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_is_valid_and_has_no_outputs(name):
    book = json.loads((FOLDER / f"{name}.ipynb").read_text())
    nbformat.validate(book)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert cells and all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_without_a_warning(runs, name):
    streams = {output.name for output in _outputs(runs[name]) if output.output_type == "stream"}
    assert "stderr" not in streams


def test_the_forecast_has_a_table_of_the_result_and_a_fan_chart(runs):
    kinds = _kinds(runs["forecast"])
    assert kinds.count("image/png") == 1
    pages = [
        output.data["text/html"]
        for output in _outputs(runs["forecast"])
        if "text/html" in output.get("data", {})
    ]
    assert sum("SearchResult of snis" in page for page in pages) == 1
    assert any("mean reward" in page for page in pages)


def test_the_text_s_log_z_is_near_the_exact_one(runs):
    numbers = re.search(r"log Z ([\d.]+) ± ([\d.]+), exact ([\d.]+)", _printed(runs["text"]))
    assert numbers is not None
    estimate, error, exact = map(float, numbers.groups())
    assert 0 < error < 0.3 and abs(estimate - exact) < 4 * error
