"""Evaluation runs of the bundled model: their files, durability, budget, and what may change a result.

See docs/guides/evaluate.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import yaml

from sdt_dist.cluster.cli import main
from sdt_dist.errors import ConfigurationError, ResultsError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.executor import InProcess
from sdt_dist.evaluation.plan import load_config, resolve
from sdt_dist.evaluation.results import ResultLog, read_problems
from sdt_dist.evaluation.runner import Progress
from sdt_dist.evaluation.summary import recompute, tabulate
from sdt_dist.models.loading import load_model
from sdt_dist.protocols import Decoded
from sdt_dist.report.figures.draw import draw_all
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import parse_reward
from sdt_dist.search.methods import get_method, method_names
from tests.evaluation_helpers import evaluate_into

SETTINGS = {
    "num_problems": 3, "horizon": 8, "context_length": 64, "num_rollouts": 8, "num_samples": 6, "wave_size": 4,
}  # fmt: skip
FEW = {**SETTINGS, "methods": ["sample", "residual_ts"]}
DOCUMENTS = ("summary.json", "truth.json", "summary.md")
FORECAST_METRICS = {
    "crps",
    "wql",
    "mase",
    "coverage_80",
    "dtw",
    "spec_w1",
    "spec_w1_half",
    "log_l1",
}
SAMPLE_METRICS = {
    "reward_mean", "reward_best", "distinct_samples", "perplexity", "distinct_1", "distinct_2", "distinct_3",
    "success_rate", "length", "nfe", "model_calls", "wall_s",
}  # fmt: skip
LINE_KEYS = {
    "problem", "method", "seed", "samples", "rewards", "weights", "nfe", "model_calls", "rollouts", "reward_calls",
    "recomputed_tokens", "wall_s",
}  # fmt: skip


class Told(Progress):
    """Remembers what a run reported."""

    def __init__(self) -> None:
        self.total = -1
        self.pairs = []

    def start(self, total: int) -> None:
        self.total = total

    def done(self, line) -> None:
        self.pairs.append(_pair(line))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return load_model("bundled")


@pytest.fixture(scope="module")
def evaluate(model):
    def run(directory: Path, settings: dict = FEW, **options) -> list[dict]:
        evaluate_into(directory, settings, executor=InProcess(lambda _: model), **options)
        return _lines(directory)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Every method on three problems, by the command line; tests copy it before they change anything."""
    directory = tmp_path_factory.mktemp("finished")
    (directory / "given.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = ["sdt", "evaluate", str(directory / "given.yaml"), "--output", str(directory / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as done:
            main()
    assert done.value.code == 0
    return directory / "run"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def _lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def _pair(line: dict) -> tuple[int, str]:
    return line["problem"], line["label"]


def _results(lines: list[dict]) -> dict[tuple[int, str], dict]:
    """Everything but the time, by problem and label; a pair that occurs twice fails."""
    found = {
        _pair(line): {key: value for key, value in line.items() if key != "wall_s"}
        for line in lines
    }
    assert len(found) == len(lines)
    return found


def _strict(path: Path):
    def refuse(constant: str):
        raise AssertionError(f"{constant} in {path.name}")

    return [json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines()]


def test_a_run_writes_every_file_of_the_specification(finished):
    assert {p.name for p in finished.iterdir()} >= {
        "config.yaml",
        "samples.jsonl",
        "figures",
        *DOCUMENTS,
    }
    config = EvaluationConfig.model_validate(yaml.safe_load((finished / "config.yaml").read_text()))
    assert config == EvaluationConfig(**SETTINGS)
    assert not list(finished.glob("*.tmp"))


def test_the_summary_has_every_metric_of_every_method(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary) == list(method_names())
    for label, row in summary.items():
        assert set(row) >= FORECAST_METRICS | SAMPLE_METRICS, label
        for found in row.values():
            assert found["low"] <= found["mean"] + 1e-12 and found["mean"] <= found["high"] + 1e-12
    assert set(summary["residual_ts"]) >= {"log_z", "ess", "depth", "branching"}
    assert set(summary["snis"]) >= {"log_z", "ess"}
    assert "log_z" not in summary["sample"]
    truth = json.loads((finished / "truth.json").read_text())["summary"]
    assert set(truth) >= {"spec_w1", "spec_w1_half", "log_l1"}


def test_every_line_is_strict_json_with_its_samples_and_cost(finished):
    lines = _strict(finished / "samples.jsonl")
    assert {_pair(line) for line in lines} == {(i, m) for i in range(3) for m in method_names()}
    for line in lines:
        assert set(line) >= LINE_KEYS and line["status"] == "ok" and line["seed"] == 0
        assert len(line["samples"]) == len(line["rewards"]) == len(line["weights"]) >= 1
        assert all(len(sample) == 8 for sample in line["samples"])
        assert sum(line["weights"]) == pytest.approx(1.0)
        assert line["best_reward"] >= max(line["rewards"])


def test_the_table_and_the_figures_are_not_empty(finished):
    table = (finished / "summary.md").read_text()
    assert all(f"| {label} |" in table for label in [*method_names(), "*true future*"])
    figures = sorted((finished / "figures").iterdir())
    assert {p.stem for p in figures} >= {
        "quality_cost",
        "rewards",
        "spectra",
        "fans",
        "diversity",
        "log_z",
    }
    for path in figures:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 100 and np.ptp(pixels[..., :3]) == 1.0


def test_the_documents_follow_from_the_problems_and_samples_alone(finished, copy):
    for name in DOCUMENTS:
        (copy / name).unlink()
    summary = recompute(copy)
    assert all((copy / name).read_bytes() == (finished / name).read_bytes() for name in DOCUMENTS)
    for label in method_names():
        own = [line for line in _lines(copy) if line["label"] == label]
        assert summary[label]["nfe"]["mean"] == pytest.approx(
            np.mean([line["nfe"] for line in own])
        )
        assert summary[label]["reward_mean"]["mean"] == pytest.approx(
            np.mean([line["rewards"] for line in own])
        )


def test_a_torn_last_line_is_the_only_work_repeated(finished, copy, evaluate):
    whole = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "samples.jsonl").write_bytes(b"".join(whole[:-1]) + whole[-1][: len(whole[-1]) // 2])
    told = Told()
    evaluate(copy, SETTINGS, resume=True, progress=told)
    again = (copy / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert told.total == 1 and told.pairs == [_pair(json.loads(whole[-1]))]
    assert again[:-1] == whole[:-1]
    assert _results(_lines(copy)) == _results(_lines(finished))


def test_a_killed_run_goes_on_with_nothing_lost_or_done_twice(finished, tmp_path, evaluate):
    output = tmp_path / "run"
    samples = tmp_path / "run" / "samples.jsonl"
    command = [
        sys.executable,
        "-m",
        "sdt_dist.cluster.cli",
        "evaluate",
        str(finished.parent / "given.yaml"),
    ]
    process = subprocess.Popen(
        [*command, "--output", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not (samples.exists() and b"\n" in samples.read_bytes()):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = samples.read_bytes()
    durable = kept[: kept.rfind(b"\n") + 1]
    before = [_pair(json.loads(line)) for line in durable.splitlines()]
    told = Told()
    evaluate(output, SETTINGS, resume=True, progress=told)
    everything = _results(_lines(finished))
    assert 0 < len(before) < len(everything)
    assert samples.read_bytes().startswith(durable)
    assert sorted(before + told.pairs) == sorted(everything)
    assert _results(_lines(output)) == everything


def test_a_finished_run_resumes_without_a_model(finished, copy):
    def refuse(_: str):
        raise AssertionError("the model was loaded")

    told = Told()
    evaluate_into(copy, SETTINGS, executor=InProcess(refuse), resume=True, progress=told)
    assert told.total == 0
    assert (copy / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "resume", "words"),
    [
        ({}, False, ["--resume"]),
        ({"num_samples": 7}, True, ["num_samples", "6", "7"]),
        ({"seed": 1}, True, ["seed"]),
    ],
)
def test_a_directory_with_results_is_refused_and_left_alone(copy, evaluate, change, resume, words):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(ResultsError) as error:
        evaluate(copy, SETTINGS | change, resume=resume)
    assert all(word in str(error.value) for word in words)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b'{"problem": 0}\n', b"\xff\n"])
def test_a_damaged_line_in_the_middle_is_refused(copy, line):
    lines = (copy / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "samples.jsonl").write_bytes(b"".join([lines[0], line, *lines[1:]]))
    with pytest.raises(ResultsError, match="damaged"):
        ResultLog(copy)


@pytest.mark.parametrize("text", [b"name: my own\n", b"- list\n", b"a: [\n", b"\xff", None])
def test_a_directory_whose_configuration_is_not_ours_is_refused_and_left_alone(
    copy, evaluate, text
):
    """With results beside it, and, where there is a file at all, without."""
    path = copy / "config.yaml"
    path.unlink() if text is None else path.write_bytes(text)
    for _ in range(1 if text is None else 2):
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        with pytest.raises(ResultsError, match=r"config\.yaml"):
            evaluate(copy, SETTINGS, resume=True)
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
        (copy / "samples.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize("text", ["{", "[{}]", "[1]", '[{"history": [], "truth": []}]', "[]"])
def test_damaged_problems_are_refused(copy, text):
    (copy / "problems.json").write_text(text)
    with pytest.raises(ResultsError, match="problem"):
        recompute(copy)


def test_data_that_changed_under_the_same_path_are_noticed(tmp_path, evaluate):
    def write(first: float) -> None:
        values = np.sin(np.arange(200) / 4)
        values[150] = first
        pd.DataFrame({"load": values}).to_csv(tmp_path / "own.csv", index=False)

    settings = SETTINGS | {
        "dataset": str(tmp_path / "own.csv"),
        "num_problems": 1,
        "methods": ["sample"],
    }
    write(0.1)
    evaluate(tmp_path / "run", settings)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    write(0.2)
    with pytest.raises(ResultsError, match="has changed"):
        evaluate(tmp_path / "run", settings, resume=True)
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before
    write(0.1)
    evaluate(tmp_path / "run", settings, resume=True)


def _tables(text: str) -> list[dict[str, dict[str, str]]]:
    """{row: {column: cell}} of every Markdown table in a text."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([part.strip() for part in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [
        {row[0]: dict(zip(t[0][1:], row[1:], strict=True)) for row in t[2:]} for t in tables if t
    ]


def test_the_summary_has_intervals_ratios_and_paired_differences(finished):
    summary = json.loads((finished / "summary.json").read_text())
    table = tabulate(finished)
    means, intervals, ratios, differences = _tables((finished / "summary.md").read_text())
    assert list(means) == list(intervals) == [*method_names(), "*true future*"]
    found = summary["snis"]["crps"]
    assert (
        intervals["snis"]["CRPS"]
        == f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    )
    assert list(ratios["snis"]) == ["CRPS", "Spec-W1 (L)", "Spec-W1 (L/2)", "log-L1"]
    assert list(differences["snis"]) == [*ratios["snis"], "reward"]
    for label in set(method_names()) - {"sample"}:
        own, base = (
            np.array([table[name][i]["spec_w1_half"] for i in range(3)])
            for name in (label, "sample")
        )
        assert ratios[label]["Spec-W1 (L/2)"].startswith(f"{own.mean() / base.mean():.3f} [")
        assert differences[label]["Spec-W1 (L/2)"].startswith(f"{(own - base).mean():+.3f} [")


def test_a_horizon_without_a_spectrum_is_evaluated_without_one(tmp_path, evaluate):
    evaluate(tmp_path / "run", FEW | {"horizon": 2, "reward": "smoothness", "num_problems": 1})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "crps" in summary["sample"] and "spec_w1" not in summary["sample"]
    assert "spectra" not in {path.stem for path in draw_all(tmp_path / "run")}


def test_resume_starts_afresh_where_there_is_nothing_and_seeds_decide(tmp_path, evaluate):
    (tmp_path / "empty").mkdir()
    first = _results(evaluate(tmp_path / "empty", resume=True))
    assert (
        _results(evaluate(tmp_path / "absent", resume=True))
        == first
        == _results(evaluate(tmp_path / "plain"))
    )
    other = _results(evaluate(tmp_path / "other", FEW | {"seed": 1}))
    assert all(first[pair]["samples"] != other[pair]["samples"] for pair in first)


def test_problems_in_flight_do_not_change_results(finished, tmp_path, evaluate):
    alone = evaluate(tmp_path / "alone", SETTINGS | {"problems_in_flight": 1})
    assert _results(alone) == _results(_lines(finished))


def test_a_failed_problem_is_recorded_and_the_others_go_on(tmp_path, evaluate):
    reward = tmp_path / "own.py"
    reward.write_text(
        "import numpy as np\n\ndef score(series, context):\n"
        "    return np.full(len(series), np.nan) if context.history.mean() > 300 else -series.std(axis=1)\n"
    )
    lines = evaluate(tmp_path / "run", FEW | {"reward": f"{reward}:score"})
    failed = [line for line in lines if line["status"] == "failed"]
    assert sorted(map(_pair, failed)) == [(0, "residual_ts"), (0, "sample")]
    assert all("nan" in line["error"] and not line["samples"] for line in failed)
    assert all(len(line["samples"]) == 6 for line in lines if line["status"] == "ok")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for label in FEW["methods"]:
        assert summary[label]["success_rate"]["mean"] == pytest.approx(2 / 3)
        others = [
            np.mean(line["rewards"])
            for line in lines
            if line["label"] == label and line["status"] == "ok"
        ]
        assert summary[label]["reward_mean"]["mean"] == pytest.approx(np.mean(others))


def test_the_budget_is_matched_within_one_wave(finished):
    lines = [line for line in _lines(finished) if not get_method(line["method"]).reference]
    assert len({line["method"] for line in lines}) == len(method_names()) - 2
    for index in range(3):
        costs = [line["nfe"] for line in lines if line["problem"] == index]
        assert max(costs) - min(costs) <= SETTINGS["wave_size"] * SETTINGS["horizon"]


def test_each_reward_belongs_to_its_sample(finished, model):
    """Samples are rounded to 8 digits, so their own rewards agree to what the log of a small power makes of that."""
    factory = parse_reward(EvaluationConfig().reward)
    process = model.process(SETTINGS["horizon"])
    problems = {problem.index: problem for problem in read_problems(finished)}
    for line in _lines(finished):
        history = problems[line["problem"]].history
        reward = factory.build(RewardContext(history=history))
        root = process.root(history)
        decoded = process.decode(root, [tuple(tokens) for tokens in line["tokens"]])
        written = [Decoded((), series=np.array(sample)) for sample in line["samples"]]
        for exact, rounded in zip(decoded, written, strict=True):
            np.testing.assert_allclose(rounded.series, exact.series, rtol=5e-8, atol=0)
        np.testing.assert_allclose(reward.score(decoded), line["rewards"], rtol=1e-9)
        np.testing.assert_allclose(reward.score(written), line["rewards"], rtol=0, atol=1e-4)


def test_labels_must_differ():
    twice = [{"name": "dts"}, {"name": "dts", "options": {"wave_size": 2}}]
    with pytest.raises(ConfigurationError, match="label"):
        resolve(load_config(None, {"methods": twice}))
    twice[1]["label"] = "dts, small waves"
    assert [m.label for m in load_config(None, {"methods": twice}).method_configs()] == [
        "dts",
        "dts, small waves",
    ]
