"""The wheel and the sdist: one import package that holds every file of the four folders, whichever way it is built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = ("actors", "tune", "cluster")
BUILD = "import sys, hatchling.build as backend; getattr(backend, sys.argv[1])(sys.argv[2])"


def _build(what: str, tree: Path, folder: Path) -> Path:
    """The one file that the build backend makes of a tree, as pip and `python -m build` call it."""
    done = _backend(what, tree, folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


def _backend(what: str, tree: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    return subprocess.run(
        [sys.executable, "-c", BUILD, what, str(folder)], cwd=tree, capture_output=True, text=True
    )


def _files_of_the_tree() -> set[str]:
    """What git has under the four folders, by the names that it has in the package; links themselves are no files."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "sdt_dist", *LINKS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout.splitlines()
    files = {name for name in listed if (ROOT / name).is_file()}
    return {name if name.startswith("sdt_dist/") else f"sdt_dist/{name}" for name in files}


def _members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("build_sdist", ROOT, tmp_path_factory.mktemp("sdist") / "out")


@pytest.fixture(scope="module", params=["directly", "from the sdist"])
def wheel(
    request: pytest.FixtureRequest, sdist: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if request.param == "directly":
        return _build("build_wheel", ROOT, folder / "out")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return _build("build_wheel", tree, folder / "out")


def test_a_wheel_holds_every_file_of_the_four_folders_and_nothing_else(wheel):
    want = _files_of_the_tree()
    assert {"sdt_dist/actors/fleet.py", "sdt_dist/tune/sweep.py", "sdt_dist/cluster/cli.py"} < want
    have = {name for name in _members(wheel) if ".dist-info/" not in name}
    assert have == want


def test_a_wheel_has_one_top_level_package(wheel):
    tops = {name.partition("/")[0] for name in _members(wheel)}
    assert "sdt_dist" in tops and len(tops) == 2
    assert all(top == "sdt_dist" or top.endswith(".dist-info") for top in tops)


def test_an_sdist_holds_the_folders_once_and_as_folders(sdist):
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert _files_of_the_tree() < set(members)
    assert {"pyproject.toml", "hatch_build.py", "LICENSE", "README.md"} < set(members)
    assert not any(member.issym() or member.islnk() for member in members.values())
    assert not [name for name in members if name.startswith(tuple(f"{one}/" for one in LINKS))]


@pytest.mark.parametrize("what", ["build_wheel", "build_sdist", "build_editable"])
def test_links_that_are_text_end_a_build_with_one_message(what, tmp_path):
    tree = tmp_path / "tree"
    (tree / "sdt_dist" / "tune").mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "sdt_dist/__init__.py").touch()
    (tree / "sdt_dist/tune/__init__.py").touch()
    for name in ("actors", "cluster"):
        (tree / "sdt_dist" / name).write_text(f"../{name}")
    done = _backend(what, tree, tmp_path / "out")
    assert done.returncode != 0 and list((tmp_path / "out").iterdir()) == []
    said = (done.stdout + done.stderr).splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("sdt-dist: sdt_dist/actors, sdt_dist/cluster: no folder of modules")
    assert "core.symlinks" in said[0]
