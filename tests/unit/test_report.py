"""A report's numbers follow from the samples alone, it stands on its own, and it says what changed.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from sdt_dist.errors import ResultsError, SdtError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.environment import note_environment, read_environment, server_record
from sdt_dist.evaluation.results import tree_path
from sdt_dist.evaluation.significance import Difference, between_methods
from sdt_dist.evaluation.tables import columns_of_tests
from sdt_dist.report.blocks import Section
from sdt_dist.report.changes import sections_of_several
from sdt_dist.report.differences import in_words
from sdt_dist.report.html import to_html
from sdt_dist.report.markdown import to_markdown
from sdt_dist.report.run import RunFiles, run_section
from sdt_dist.report.tree import Choice, problem_section
from sdt_dist.report.value_error import ValueErrors
from sdt_dist.report.write import write_report
from sdt_dist.tasks.forecast import FORECAST
from sdt_dist.tree.snapshot import Snapshot
from tests.evaluation_helpers import evaluate_into
from tests.report_helpers import (
    COSTS,
    Page,
    as_printed,
    check_cell,
    column_of,
    holm,
    interval_of,
    lines_of,
    measures_of,
    true_spectra,
)

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["sample", "snis", "residual_ts"]
TESTED = columns_of_tests(FORECAST)


def _run(directory: Path, **settings) -> Path:
    config = EvaluationConfig(
        **{
            "num_problems": 5, "horizon": 12, "context_length": 96, "num_rollouts": 8, "num_samples": 6, "wave_size": 4,
            "methods": METHODS,
        } | settings
    )  # fmt: skip
    evaluate_into(directory, config)
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    return [_run(base / "before"), _run(base / "after", inverse_temperature=30.0)]


@pytest.fixture(scope="module")
def measured(runs) -> dict[str, dict]:
    return {f"run-{number}": measures_of(directory) for number, directory in enumerate(runs)}


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written.read_text())


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs[0], tmp_path / "copy"))


def test_every_mean_and_interval_is_that_of_the_samples(page, measured):
    cells = {place: cell for place, cell in page.of("methods").items() if place[1] != "true future"}
    assert {metric for *_, metric in cells} == {
        "crps", "wql", "mase", "coverage_80", "spec_w1", "spec_w1_half", "log_l1", "reward_mean", "reward_best", "ess",
        "log_z", "distinct_samples",
    }  # fmt: skip
    for (run, label, metric), cell in cells.items():
        rows = measured[run][label]
        if metric == "wql":
            parts = [column_of(rows, "wql_loss"), column_of(rows, "wql_scale")]
            ratio = lambda a, b, axis: np.sum(a, axis=axis) / np.sum(b, axis=axis)  # noqa: E731
            check_cell(cell, parts[0].sum() / parts[1].sum(), *interval_of(*parts, statistic=ratio))
        else:
            check_cell(cell, column_of(rows, metric).mean(), *interval_of(column_of(rows, metric)))
    assert len(cells) == 2 * (3 * 12 - 1)  # two runs; plain sampling has no log Z


def test_the_true_futures_are_measured_too(page, runs):
    rows = true_spectra(runs[0]).values()
    found = {
        metric: cell
        for (run, label, metric), cell in page.of("methods").items()
        if (run, label) == ("run-0", "true future")
    }
    assert set(found) == {"spec_w1", "spec_w1_half", "log_l1"}
    for metric, cell in found.items():
        values = np.array([row[metric] for row in rows])
        check_cell(cell, values.mean(), *interval_of(values))


@pytest.mark.parametrize("table", ["paired", "changes"])
def test_every_difference_and_its_test_is_that_of_the_samples(page, measured, table):
    by_run: dict[str, dict] = {}
    for (run, label, metric), cell in page.of(table).items():
        own = measured[run][label]
        other = measured["run-0"][label] if table == "changes" else measured[run]["sample"]
        difference = column_of(own, metric) - column_of(other, metric)
        check_cell(cell, difference.mean(), *interval_of(difference))
        assert int(cell["numbers"]["num"]) == len(difference) == 5
        p = 1.0 if not difference.any() else wilcoxon(difference, zero_method="zsplit").pvalue
        assert float(cell["numbers"]["p"]) == pytest.approx(p)
        by_run.setdefault(run, {})[label, metric] = p
    assert {run: len(found) for run, found in by_run.items()} == (
        {"run-1": 3 * 7} if table == "changes" else {"run-0": 2 * 7, "run-1": 2 * 7}
    )
    for run, found in by_run.items():
        corrected = holm(found)
        for (label, metric), p in corrected.items():
            cell = page.of(table)[run, label, metric]
            assert float(cell["numbers"]["p-holm"]) == pytest.approx(p)
            printed = re.fullmatch(r"p (\S+), Holm (\S+)", cell["lines"][2])
            assert float(printed[1]) == pytest.approx(found[label, metric], rel=0.06)
            assert float(printed[2]) == pytest.approx(p, rel=0.06)


def test_every_cost_is_that_of_the_samples(page, measured):
    cells = page.of("costs")
    assert {metric for *_, metric in cells} == {*COSTS, "ms_per_nfe", "problems", "failed"}
    for (run, label, metric), cell in cells.items():
        rows = measured[run][label]
        nfe, wall = (column_of(rows, name).sum() for name in ("nfe", "wall_s"))
        others = {"ms_per_nfe": 1000 * wall / nfe, "problems": 5, "failed": 0}
        value = others[metric] if metric in others else column_of(rows, metric).mean()
        printed, half = as_printed(cell["lines"][0])
        assert printed == pytest.approx(value, abs=half)
    beside = page.of("side_by_side")
    for place, cell in beside.items():
        known = page.of("costs").get(place) or page.of("methods")[place]
        assert float(cell["numbers"]["mean"]) == float(known["numbers"]["mean"])
    assert len(beside) == 2 * 3 * 7


def test_the_page_needs_nothing_else_and_every_link_leads_somewhere(page):
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
    targets = [link[1:] for link in page.links if link.startswith("#")]
    assert len(targets) > 20 and set(targets) <= page.anchors
    assert "default-src 'none'" in page.source
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", page.source)


def test_it_says_what_changed_and_what_did_not(page):
    text = " ".join(page.text.split())
    assert "What changed from before to after" in text and "inverse_temperature 3.0 30.0" in text
    # sample
    assert (
        "5 problems are in both runs. Of the 15 searches that both made, 5 returned the very same samples."
        in text
    )
    changes = page.of("changes")
    up = [
        label
        for (_, label, metric), cell in changes.items()
        if metric == "reward_mean" and float(cell["numbers"]["low"]) > 0
    ]
    assert set(up) == {"snis", "residual_ts"}
    assert f"reward (good: higher) is higher in after for {' , '.join(up)} ." in text


def test_the_tree_is_the_saved_one(page, runs):
    saved = Snapshot.load(tree_path(runs[0], "residual_ts"))
    nodes = saved.tree.nodes[: saved.tree.size]
    tree = page.trees[0]
    assert tree["label"] == "residual_ts" and len(tree["parent"]) == tree["size"] == saved.tree.size
    assert tree["parent"] == nodes["parent"].tolist() and tree["visits"] == nodes["visits"].tolist()
    assert tree["token"] == nodes["token"].tolist()
    np.testing.assert_allclose(tree["p"], np.exp(nodes["log_prior"]), rtol=1e-3)
    line = next(line for line in lines_of(runs[0]) if line["label"] == "residual_ts")
    known = dict(zip(line["tokens"][0], line["samples"][0], strict=True))
    assert all(
        mean == known[token]
        for token, mean in zip(tree["token"], tree["means"], strict=True)
        if token in known
    )


def test_problems_and_methods_can_be_chosen(runs, tmp_path):
    files = RunFiles.load(runs[0], "name", "run-0")
    one_problem = problem_section(files, Choice.of(files, 2, None), [])
    other = Page(
        to_html("title", "", [run_section(files, [], one_problem, files.reference("snis"))])
    )
    text = " ".join(other.text.split())
    assert (
        not other.trees
        and "No search tree of problem 2 was kept. Trees in this run: of problem 0 by residual_ts ."
        in text
    )
    assert {label for _, label, _ in other.of("paired")} == {"sample", "residual_ts"}
    assert "Compared with snis" in text
    assert (
        Choice.of(files, 0, "residual_ts").label == "residual_ts"
        and Choice.of(files, 0, "snis").label is None
    )
    for choice in ({"problem": 5}, {"method": "dts"}, {"reference": "dts"}):
        (name,) = choice
        with pytest.raises(ResultsError, match=f"^{name}: .*allowed: "):
            write_report(runs, tmp_path, **choice)


def test_markdown_has_the_same_tables_and_both_kinds_of_figures(page, written):
    text = written.with_name("report.md").read_text()
    images = re.findall(r"!\[\w+\]\((\S+)\.png\)", text)
    names = {"quality_cost", "fans", "spectra", "rewards", "diversity", "log_z", "problem", "tree"}
    assert {Path(image).name for image in images} == names and len(images) == 2 * len(names)
    sizes = [
        (written.parent / f"{image}{kind}").stat().st_size
        for image in images
        for kind in (".png", ".pdf")
    ]
    assert min(sizes) > 1000
    rows = [line.replace("**", "") for line in text.splitlines() if line.startswith("| ")]
    for table in ("methods", "paired", "changes", "costs"):
        for (_, label, _), cell in page.of(table).items():
            shown = f"| {' '.join(cell['lines'])} |"
            assert any(row.startswith(f"| {label}") and shown in row for row in rows)


def _compared(*directories: Path) -> Page:
    """What a report says of several runs, without their own parts."""
    runs = [
        RunFiles.load(directory, f"name{place}", f"run-{place}")
        for place, directory in enumerate(directories)
    ]
    return Page(to_html("title", "", sections_of_several(runs)))


def test_runs_on_other_problems_are_called_unpaired(runs, tmp_path):
    found = _compared(
        runs[0], _run(tmp_path / "other", num_problems=2, horizon=8, methods=["sample", "snis"])
    )
    assert "so they are unpaired" in " ".join(found.text.split())
    assert not found.of("changes") and found.of("side_by_side")


def test_equal_runs_have_changed_nothing(runs):
    found = _compared(runs[0], runs[0])
    assert "the same configuration, versions and hardware" in found.text
    assert "Of the 15 searches that both made, 15 returned the very same samples." in " ".join(
        found.text.split()
    )
    numbers = [cell["numbers"] for cell in found.of("changes").values()]
    assert len(numbers) == 3 * 7 and all(
        n[name] == "0.0" for n in numbers for name in ("low", "mean", "high")
    )
    assert all(n["p"] == n["p-holm"] == "1.0" for n in numbers)


def test_directories_of_one_name_are_told_apart(tmp_path):
    for place in "ab":
        ValueErrors(place, {"dts": {0: 0.25}}).save(tmp_path / place / "toys")
    page = Page(write_report([tmp_path / "a/toys", tmp_path / "b/toys"], tmp_path).read_text())
    assert "Evaluation of toys (1) and toys (2)" in page.text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("environment.json", "{", "environment.json is damaged"),
        ("environment.json", "[1]", "environment.json"),
        ("samples.jsonl", '{"problem":0,"name":"x","method":"snis","label":"snis","seed":0,"status":"ok","samples":[[1]]}\n',
         "problem 0 and snis"),
        ("samples.jsonl", "", "no result yet"),
        ("problems.json", "[", "problems.json"),
        ("config.yaml", "a: [", "config.yaml"),
        ("trees/residual_ts.npz", "no tree", "residual_ts.npz"),
        ("value_error.json", '{"curves": 3}', "value_error.json is damaged"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(copy, tmp_path, name, text, words):
    (copy / name).write_text(text)
    with pytest.raises(SdtError, match=re.escape(words)):
        write_report([copy], tmp_path / "report")


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ResultsError, match=r"holds no samples\.jsonl"):
        write_report([tmp_path], tmp_path / "report")


def test_failed_searches_are_counted_and_explained(copy):
    lines = lines_of(copy)
    for line in lines:
        if line["label"] == "snis" and line["problem"] in (1, 2):
            line |= {
                "status": "failed",
                "error": "reward: <b>nan</b>",
                "samples": [],
                "rewards": [],
                "weights": [],
            }
    (copy / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    files = RunFiles.load(copy, "name", "run-0")
    found = Page(to_html("title", "", [run_section(files, [], Section("one", "one"), "sample")]))
    assert found.of("costs")["run-0", "snis", "failed"]["lines"] == ["2"]
    assert {
        int(c["numbers"]["num"])
        for (_, label, _), c in found.of("paired").items()
        if label == "snis"
    } == {3}
    text = " ".join(found.text.split())
    assert "snis failed on 2 problems, first on" in text and "reward: <b>nan</b>" in text
    assert "not finished: 1 searches are missing" in text


def test_a_run_in_which_everything_failed_has_a_report(copy, tmp_path):
    lines = lines_of(copy)
    failed = [line | {"status": "failed", "error": "no", "samples": []} for line in lines]
    (copy / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in failed))
    found = Page(write_report([copy], tmp_path / "report").read_text())
    assert "Every search failed" in found.text and not found.of("methods")


def test_value_errors_alone_make_a_report(tmp_path):
    curves = {"dts": {0: 0.25, 1: 0.5}, "residual_ts": {0: 0.125}}
    ValueErrors("a toy", curves).save(tmp_path / "toys")
    assert ValueErrors.load(tmp_path / "toys") == ValueErrors("a toy", curves)
    cells = Page(write_report([tmp_path / "toys"], tmp_path / "report").read_text()).of(
        "value_error"
    )
    shown = {(label, metric): float(cell["lines"][0]) for (_, label, metric), cell in cells.items()}
    assert shown == {
        ("dts", "depth 0"): 0.25,
        ("dts", "depth 1"): 0.5,
        ("residual_ts", "depth 0"): 0.125,
    }


def test_a_run_notes_its_environment_once_a_kind(runs, tmp_path):
    (entry,) = read_environment(runs[0])
    assert entry["packages"]["numpy"] == np.__version__ and entry["cores"] >= 1
    assert (
        entry["servers"] == [server_record("bundled")] and len(entry["servers"][0]["weights"]) == 32
    )
    assert "http" not in json.dumps(server_record("http://secret.example:8011", 3)).replace(
        '"backend": "http"', ""
    )
    for count in (1, 2, 2):
        note_environment(tmp_path, [server_record("bundled", count)])
    assert [e["servers"][0]["count"] for e in read_environment(tmp_path)] == [1, 2]


def test_a_difference_has_the_sign_of_the_method_and_needs_the_metric():
    table = {
        "base": {0: {"crps": 1.0}, 1: {"crps": 2.0}, 2: {"crps": 5.0}},
        "own": {0: {"crps": 1.5}, 1: {}, 2: {"crps": 6.0}},
    }
    found = between_methods(table, "base", FORECAST.tested)
    assert list(found) == ["own"] and list(found["own"]) == ["crps"]
    assert found["own"]["crps"].mean == 0.75 and found["own"]["crps"].num == 2
    assert found["own"]["crps"].p == found["own"]["crps"].p_holm == 0.5


def test_an_ablation_says_what_it_varied_and_comes_first(tmp_path):
    directory = _run(
        tmp_path / "run",
        num_problems=2,
        methods=["snis"],
        ablate={"rollouts": [4, 8], "lambda": [1.0, 3.0, 30.0]},
    )
    files = RunFiles.load(directory, "run", "run-0")
    figures = [Path("figures/quality_cost"), Path("figures/ablation")]
    found = run_section(files, figures, Section("Problem 0", "problem"), files.reference(None))
    titles = [part.title for part in found.parts]
    assert titles[:4] == [
        "Ablations",
        "Results",
        "Compared with snis[rollouts=8,lambda=3]",
        "Quality and cost",
    ]
    text = to_markdown("", [Section("", "", found.blocks)], tmp_path)
    assert "with λ = 1, 3 and 30 and r" in text and "about 4 and 8 rollouts" in text
    assert "1 method at 6 points of an ablation on the same 2 problems" in text
    assert (
        "| λ | 1, 3 and 30 |" in text and "| budget | cost of 4 and 8 rollouts a problem |" in text
    )


def test_every_strength_of_the_methods_is_named(tmp_path):
    own = {"name": "snis", "label": "defaults", "options": {"inverse_temperature": 3.0}}
    methods = ["sample", "residual_ts", own]
    files = RunFiles.load(
        _run(tmp_path / "run", num_problems=1, methods=methods, inverse_temperature=1.5),
        "run",
        "run-0",
    )
    found = run_section(files, [], Section("Problem 0", "problem"), files.reference(None))
    assert "with λ = 1.5 and 3 and r" in to_markdown("", [Section("", "", found.blocks)], tmp_path)


def test_one_pair_has_no_small_p_and_is_no_error():
    table = {
        label: {0: {"crps": value}}
        for label, value in (("sample", 1.0), ("same", 1.0), ("better", 0.5))
    }
    found = between_methods(table, "sample", FORECAST.tested)
    assert {label: (row["crps"].mean, row["crps"].p) for label, row in found.items()} == {
        "same": (0, 1),
        "better": (-0.5, 1),
    }


def test_many_methods_are_counted_instead_of_named():
    apart = Difference(1.0, 0.5, 1.5, 0.01, 0.1, 5)
    alike = Difference(0.0, -1.0, 1.0, 1.0, 1.0, 5)
    few = {f"m{i}": {"crps": apart if i < 2 else alike} for i in range(9)}
    many = {f"m{i}": {"crps": apart} for i in range(9)} | {"other": {"crps": alike}}
    assert in_words(few, TESTED, " than x") == [
        "CRPS (good: lower) is higher than x for `m0`, `m1`."
    ]
    assert in_words(many, TESTED, " than x") == [
        "CRPS (good: lower) is higher than x for 9 of 10 (in bold below)."
    ]
