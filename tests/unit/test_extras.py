"""A core install: what an extra brings is imported late, and one message names the extra where it is missing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sdt_dist.errors import MissingExtraError
from sdt_dist.extras import check_package, packages_of

ROOT = Path(__file__).parents[2]
ABSENT = {
    "ray", "optuna", "tensorboard", "tensorboardX", "sklearn", "sacrebleu", "rouge_score", "mlx", "mlx_lm", "vllm",
    "statsforecast", "wandb", "pyarrow",
}  # fmt: skip
CLUSTER = "pip install 'sdt-dist[cluster]'"
TUNE = "pip install 'sdt-dist[tune]'"
OPTIONAL = ABSENT | {"filelock"}  # which torch needs too
CORE = """
import contextlib, io, json, sys
given = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(given["absent"])
from sdt_dist.cluster.cli import main
done = []
for arguments in given["commands"]:
    sys.argv = ["sdt", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""
Done = tuple[int, str, str]


def sdt_core(folder: Path, *commands: list[str]) -> list[Done]:
    """(exit code, stdout, stderr) of `sdt` commands, one after another in a process that can import no optional package."""
    given = json.dumps({"absent": sorted(ABSENT), "commands": commands})
    done = subprocess.run(
        [sys.executable, "-c", CORE, given], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout.splitlines()[-1])]


def test_help_needs_no_extra(tmp_path):
    commands = [[], ["evaluate"], ["forecast"], ["generate"], ["report"], ["serve"], ["tune"], ["cluster", "submit"]]  # fmt: skip
    for code, out, err in sdt_core(tmp_path, *([*command, "--help"] for command in commands)):
        assert (code, err) == (0, "") and "Usage" in out


def test_forecasts_plans_and_a_look_at_this_machine_need_no_extra(tmp_path):
    (tmp_path / "load.csv").write_text("OT\n" + "\n".join(str(i % 24) for i in range(120)) + "\n")
    small = ["--horizon", "4", "--rollouts", "5", "--num-samples", "3", "--plot", "fan.png"]
    problems = ["--num-problems", "2", "--methods", "sample,snis", "--dry-run"]
    forecast, plan, doctor = sdt_core(
        tmp_path, ["forecast", "load.csv", *small], ["evaluate", *problems], ["doctor"]
    )
    assert forecast[0] == 0 and forecast[1].startswith("timestamp,mean,q0.1"), forecast[2]
    assert len(forecast[1].splitlines()) == 5 and (tmp_path / "fan.png").stat().st_size > 1000
    assert plan[0] == 0 and "2 problems x 2 methods" in plan[1], plan[2]
    assert doctor[0] == 0 and not doctor[2], doctor


MISSING = [
    (["tune", "--num-problems", "2", "--output", "run"], f"a sweep needs optuna: {TUNE}."),
    (["train-flow", "--output", "run"], f"training a flow needs tensorboard: {TUNE}."),
    (["train-flow", "--live", "--output", "run"], f"the fleet needs ray: {CLUSTER}."),
    (["doctor", "--address", "auto"], f"a Ray cluster needs ray: {CLUSTER}."),
    (["cluster", "status"], f"a Ray cluster needs ray: {CLUSTER}."),
    (["cluster", "submit", "--", "evaluate"], f"a job needs ray: {CLUSTER}."),
    (["generate", "a", "--model", "mlx:bundled", "--reward", "regex:a"],
     "model: the mlx backend needs mlx_lm: pip install 'sdt-dist[mlx]'."),
    (["generate", "a", "--model", "vllm:bundled", "--reward", "regex:a"],
     "model: the vllm backend needs vllm: pip install 'sdt-dist[vllm]'."),
]  # fmt: skip


def test_a_missing_extra_is_one_line_and_exit_code_2(tmp_path):
    for (_, wanted), (code, _, err) in zip(
        MISSING, sdt_core(tmp_path, *(command for command, _ in MISSING)), strict=True
    ):
        assert (code, err) == (2, f"sdt: {wanted}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_a_sweep_is_refused_without_an_extra(tmp_path):
    (tmp_path / "trials.jsonl").touch()
    ((code, _, err),) = sdt_core(tmp_path, ["report", "."])
    assert code == 2 and "holds a sweep" in err, err


@pytest.mark.parametrize("measure", ["classification", "generation"])
def test_measures_of_text_name_their_extra(measure, monkeypatch):
    from sdt_dist.metrics import text

    for name in ("sklearn.metrics", "rouge_score.rouge_scorer", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"needs \w+: pip install 'sdt-dist\[text\]'"):
        getattr(text, measure)(["yes"], ["yes"])


def test_the_message_says_who_needs_what_and_which_extra_brings_it():
    with pytest.raises(MissingExtraError) as caught, packages_of("cluster", "the fleet"):
        import no_such_package.inner  # noqa: F401 # pyright: ignore
    assert str(caught.value) == "the fleet needs no_such_package: pip install 'sdt-dist[cluster]'."
    with pytest.raises(MissingExtraError, match="that are not there"), packages_of("tune", "x"):
        raise ImportError("Can't import it, as some dependencies are missing.")
    with pytest.raises(MissingExtraError, match="no_such_package"):
        check_package("no_such_package", "text", "x")
    check_package("numpy", "text", "x")


def test_what_an_extra_brings_is_imported_within_packages_of_only():
    """Or in a room whose own __init__ does so first."""
    rooms = ("sdt_dist/models/mlx/", "sdt_dist/models/vllm/", "actors/remote/")
    folders = ("sdt_dist", "actors", "tune", "cluster")
    files = {path.resolve() for one in folders for path in (ROOT / one).rglob("*.py")}
    found = []
    for path in sorted(files):
        name = path.relative_to(ROOT.resolve()).as_posix()
        if not name.startswith(rooms):
            found += [f"{name}: {package}" for package in _unguarded(ast.parse(path.read_text()))]
    assert not found


def _unguarded(tree: ast.Module) -> list[str]:
    """Optional packages that a module imports at its top level outside `with packages_of(...)`."""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    return [name for name in names if name.partition(".")[0] in OPTIONAL]


def test_all_is_every_extra_of_one_environment():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["all"] == ["sdt-dist[cluster,tune,text,mlx]"]
    assert "vllm" in extras
    assert not any("ray" in one or "optuna" in one for one in project["dependencies"])
