"""The `sdt` command: one line and exit code 2 for a mistake, and what each command prints and writes (SPEC 9 and 10)."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.cli import main
from cluster.commands.forecast import _future
from sdt_dist.errors import DataError

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "evaluate", "forecast", "generate", "train-forecaster", "train-flow", "report", "doctor", "serve", "cluster",
]  # fmt: skip
QUANTILES = [f"q0.{i}" for i in range(1, 10)]
SMALL_RUN = [
    "evaluate", "--methods", "sample,snis", "--num-problems", "2", "--rollouts", "4", "--horizon", "8",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sdt(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sdt", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        printed = capsys.readouterr()
        return int(done.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def mistake(sdt):
    """Run a command that must end with exit code 2 and one line on stderr; returns the line."""

    def run(*arguments: object) -> str:
        code, _, err = sdt(*arguments)
        assert code == 2
        assert err.startswith("sdt: ") and err.count("\n") == 1, err
        return err

    return run


def _wave(rows: int = 120) -> np.ndarray:
    return 10 + np.sin(np.arange(rows) / 4) + 0.1 * np.random.default_rng(0).standard_normal(rows)


def _csv(path: Path, values: np.ndarray, frequency: str | None = None, **columns) -> Path:
    times = {} if frequency is None else {"time": pd.date_range("2021-01-01", periods=len(values), freq=frequency)}
    pd.DataFrame({**times, "load": values, **columns}).to_csv(path, index=False)
    return path


@pytest.fixture
def hourly(tmp_path) -> Path:
    return _csv(tmp_path / "hourly.csv", _wave(), "h")


@pytest.fixture
def plain(tmp_path) -> Path:
    """A series without times, beside a column of another scale."""
    return _csv(tmp_path / "plain.csv", _wave(), other=1e6 + 1e5 * _wave())


def _forecast(path: Path, *more: object) -> list[object]:
    return ["forecast", path, "--horizon", 8, "--rollouts", 8, "--num-samples", 12, *more]


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Fails where a command loads a model."""
    monkeypatch.setattr("sdt_dist.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdt", *SMALL_RUN, "--output", str(directory)])
        with pytest.raises(SystemExit) as done:
            main()
    assert not done.value.code
    return directory


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"horizn": 8}, ["horizn", "Did you mean 'horizon'"]),
        ({"horizon": "many"}, ["horizon", "many", "integer"]),
        ({"num_rollouts": 0}, ["num_rollouts", "0", "greater than or equal to 1"]),
        ({"inverse_temperature": -1}, ["inverse_temperature", "-1", "greater than 0"]),
        ({"split": "future"}, ["split", "future", "test"]),
        ({"methods": ["dst"]}, ["dst", "Did you mean 'dts'"]),
        ({"methods": [{"name": "dts", "options": {"wave": 2}}]}, ["wave", "wave_size"]),
        ({"methods": ["dts", "dts"]}, ["label"]),
        ({"dataset": "clasic"}, ["clasic", "Did you mean 'classic'"]),
        ({"dataset": "absent.csv"}, ["absent.csv", "does not exist"]),
        ({"model": "bundeld"}, ["bundeld", "Did you mean 'bundled'"]),
        ({"model": "vlm:some"}, ["vlm", "Did you mean 'vllm'"]),
        ({"model": "vllm:some"}, ["vllm", "sdt-dist[vllm]"]),
        ({"reward": "spectrl"}, ["spectrl", "Did you mean 'spectral'"]),
        ({"reward": "spectral:gama=1"}, ["gama=1", "gamma"]),
        ({"reward": "regex:a"}, ["regex:a", "series"]),
        ({"reward": "length:target=3"}, ["length", "series"]),
        ({"horizon": 3}, ["horizon 3", ">= 4"]),
        ({"horizon": 12, "reward": "spectral:segment=16"}, ["horizon 12", ">= 16"]),
        ({"horizon": 40, "context_length": 24}, ["context_length: 24", "40"]),
        ({3: 4}, ["the setting 3"]),
        ({"methods": [{"name": "dts", "options": {1: 2}}]}, ["methods", "string"]),
    ],
)
def test_a_wrong_setting_names_the_field_the_value_and_what_is_allowed(mistake, tmp_path, settings, words):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    line = mistake("evaluate", tmp_path / "run.yaml", "--output", tmp_path / "run")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_fleet_with_an_unknown_backend_is_refused_before_anything_starts(mistake, tmp_path):
    (tmp_path / "fleet.yaml").write_text("more_servers: [{model: 'mxl:/models/x'}]\n")
    line = mistake(*SMALL_RUN, "--fleet", tmp_path / "fleet.yaml", "--output", tmp_path / "run")
    assert all(word in line for word in ["more_servers.0.model", "'mxl:/models/x'", "Did you mean 'mlx'?"]), line
    assert not (tmp_path / "run").exists()


def test_an_unusable_configuration_file_is_refused(mistake, tmp_path):
    assert "absent.yaml" in mistake("evaluate", tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- horizon\n")
    assert "mapping" in mistake("evaluate", tmp_path / "list.yaml")
    for text in (b"horizon: [1\n", b"horizon: \xff\n", b"a: b: c\n", b"horizon: 8\n\x00", b"{[1]: 2}\n"):
        (tmp_path / "bad.yaml").write_bytes(text)
        assert "not YAML in UTF-8" in mistake("evaluate", tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.where(np.arange(120) == 5, np.nan, _wave()), ["load", "NaN", "row 5"]),
        (np.where(np.arange(120) == 7, np.inf, _wave()), ["load", "infinity", "row 7"]),
        (_wave(10), ["history", "10", "at least 16"]),
        (np.full(120, 3.0), ["history", "constant"]),
    ],
    ids=["nan", "infinity", "short", "constant"],
)
def test_an_unusable_series_is_refused(mistake, no_model, tmp_path, values, words):
    path = _csv(tmp_path / "bad.csv", values, "h")
    line = mistake(*_forecast(path, "--output", tmp_path / "out.csv"))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--column", "lod"], ["lod", "Did you mean 'load'"]),
        (["--time-column", "tme"], ["tme", "Did you mean 'time'"]),
        (["--column", "time"], ["time", "not numeric", "load"]),
        (["--horizon", 500], ["history", "120", "500"]),
        (["--horizon", 500, "--reward", "nonneg"], ["horizon", "500", "192"]),
        (["--quantiles", "0.1,x"], ["quantiles", "0.1,x"]),
        (["--quantiles", "0,0.5"], ["quantiles", "0,0.5"]),
        (["--quantiles", "nan"], ["quantiles", "nan"]),
        (["--method", "sniss"], ["sniss", "Did you mean 'snis'"]),
        (["--model", "./absent"], ["./absent", "does not exist"]),
        (["--reward", "nonnegg"], ["nonnegg", "Did you mean 'nonneg'"]),
        (["--reward", "absent.py:score"], ["absent.py", "does not exist"]),
        (["--reward", "crps"], ["CRPS", "true future"]),
        (["--inverse-temperature", 0], ["inverse_temperature", "0"]),
        (["--reward", "length:target=3"], ["length", "series"]),
        (["--reward", "regex:a"], ["regex:a", "series"]),
        (["--horizon", 3], ["horizon 3", ">= 4"]),
        (["--plot", "fan.foo"], ["plot", "fan.foo", ".png"]),
        (["--plot", "fan"], ["plot", "fan", ".png"]),
        (["--plot", "FILE/fan.png"], ["plot", "cannot be written"]),
        (["--output", "FILE/deep/out.csv"], ["output", "cannot be written"]),
        (["--samples", "FILE/s.csv"], ["samples", "cannot be written"]),
        (["--output", "."], ["output", "not a file"]),
        (["--output", "same.csv", "--samples", "./same.csv"], ["output, samples", "same file"]),
    ],
)
def test_a_wrong_option_of_forecast_is_refused(mistake, request, monkeypatch, hourly, options, words):
    """Before the model loads, except for the horizon that only the model knows to be too long."""
    if "192" not in words:
        request.getfixturevalue("no_model")
    monkeypatch.chdir(hourly.parent)
    Path("FILE").write_text("kept")
    line = mistake(*_forecast(hourly, *options))
    assert all(word in line for word in words), line
    assert {path.name for path in hourly.parent.iterdir()} == {"FILE", hourly.name}


@pytest.mark.parametrize("rows", [["2021-01-01"] * 2, ["2021-01-02", "2021-01-01"], ["2021-01-01", "NaT"]])
def test_times_that_do_not_increase_are_refused(mistake, no_model, tmp_path, rows):
    times = [str(time) for time in pd.date_range("2020-01-01", periods=118)] + rows
    pd.DataFrame({"time": times, "load": _wave()}).to_csv(tmp_path / "times.csv", index=False)
    assert "time" in mistake(*_forecast(tmp_path / "times.csv"))
    table = pd.DataFrame({"load": _wave()}, index=pd.DatetimeIndex(times))
    with pytest.raises(DataError, match="increase"):
        _future(table, 8)


def test_missing_and_empty_files_are_refused(mistake, tmp_path):
    assert "absent.csv" in mistake("forecast", tmp_path / "absent.csv")
    (tmp_path / "empty.csv").write_text("")
    assert "empty.csv" in mistake("forecast", tmp_path / "empty.csv")


def test_a_directory_with_other_results_is_refused(mistake, finished):
    before = (finished / "samples.jsonl").read_bytes()
    assert "--resume" in mistake(*SMALL_RUN, "--output", finished)
    assert "seed" in mistake(*SMALL_RUN, "--seed", 1, "--resume", "--output", finished)
    assert (finished / "samples.jsonl").read_bytes() == before


def test_an_output_that_cannot_be_written_is_refused(mistake, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "cannot be written" in mistake(*SMALL_RUN, "--output", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_checks_and_dry_runs_load_no_model_and_write_nothing(tmp_path, hourly):
    """In a real process, whose last command is a mistake that nothing catches."""
    code = f"""
import contextlib, io, sys
sys.path.insert(0, {str(ROOT)!r})
from cluster.cli import main
sys.argv = ["sdt", "evaluate", "--num-problems", "3", "--methods", "sample,dts", "--output", "run", "--dry-run"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main()
print("torch" in sys.modules, "3 problems x 2 methods" in out.getvalue(), flush=True)
sys.argv = ["sdt", "forecast", {str(hourly)!r}, "--method", "dst"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "False True\n")
    assert re.fullmatch(r"sdt: unknown method 'dst'\. .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == [hourly.name]


def test_help_lists_the_commands_and_shows_examples(sdt):
    code, out, _ = sdt("--help")
    assert code == 0 and all(command in out for command in COMMANDS) and re.search(r"Example:\s+sdt evaluate ", out)
    for command in COMMANDS:
        code, out, _ = sdt(command, "--help")
        assert code == 0 and re.search(rf"Examples?:\s+sdt {command}\b", out), command


@pytest.mark.parametrize("frequency", ["h", "15min", "B", "W-WED", "MS", "YE"])
def test_timestamps_continue_the_series(sdt, tmp_path, frequency):
    path = _csv(tmp_path / "series.csv", _wave(), frequency)
    code, out, _ = sdt(*_forecast(path))
    assert code == 0
    found = pd.to_datetime(pd.read_csv(io.StringIO(out))["timestamp"])
    assert found.tolist() == pd.date_range("2021-01-01", periods=128, freq=frequency)[120:].tolist()


def test_without_times_rows_are_numbered(sdt, plain):
    _, out, _ = sdt(*_forecast(plain))
    assert pd.read_csv(io.StringIO(out))["timestamp"].tolist() == list(range(120, 128))


def test_a_forecast_is_the_mean_and_quantiles_of_its_samples(sdt, plain, tmp_path):
    out, every, plot = tmp_path / "out.csv", tmp_path / "samples.csv", tmp_path / "fan.png"
    code, printed, _ = sdt(*_forecast(plain, "--output", out, "--samples", every, "--plot", plot, "--season", 25))
    assert (code, printed) == (0, "")
    frame, samples = pd.read_csv(out), pd.read_csv(every)
    assert list(frame.columns) == ["timestamp", "mean", *QUANTILES] and len(frame) == 8
    assert list(samples.columns) == ["timestamp", *(f"s{i}" for i in range(12))]
    assert frame["timestamp"].tolist() == samples["timestamp"].tolist()
    paths = samples.drop(columns="timestamp").to_numpy()
    assert (np.diff(frame[QUANTILES].to_numpy(), axis=1) >= 0).all()
    np.testing.assert_allclose(frame["mean"], paths.mean(axis=1), rtol=2e-7)
    np.testing.assert_allclose(frame[QUANTILES].T, np.quantile(paths, np.arange(1, 10) / 10, axis=1), rtol=2e-7)
    assert np.ptp(matplotlib.image.imread(plot)[..., :3]) == 1.0


def test_folders_are_made_and_one_failed_output_loses_none(sdt, mistake, plain, tmp_path):
    out, every, plot = tmp_path / "out.csv", tmp_path / "a" / "b" / "samples.csv", tmp_path / "c" / "fan.svg"
    (tmp_path / "out.csv.tmp").mkdir()
    code, printed, err = sdt(*_forecast(plain, "--output", out, "--samples", every, "--plot", plot))
    assert code == 2 and re.fullmatch(r"sdt: output: .*out.csv cannot be written .*printed.*\n", err)
    assert not out.exists() and len(pd.read_csv(every)) == 8 and plot.read_text().startswith("<?xml")
    assert list(pd.read_csv(io.StringIO(printed)).columns) == ["timestamp", "mean", *QUANTILES]


def test_a_forecast_repeats_by_its_seed(sdt, plain):
    first, again, other = (sdt(*_forecast(plain, "--seed", seed))[1] for seed in (3, 3, 4))
    assert first == again != other


def test_columns_and_quantiles_are_chosen(sdt, plain):
    for options, scale in ((["--column", "load"], 10), (["--column", "other"], 2e6), ([], 2e6)):
        code, out, _ = sdt(*_forecast(plain, "--quantiles", "0.05,0.5", *options))
        frame = pd.read_csv(io.StringIO(out))
        assert code == 0 and list(frame.columns) == ["timestamp", "mean", "q0.05", "q0.5"]
        assert frame["mean"].between(0.5 * scale, 2 * scale).all()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A randomly initialised Llama and its word tokenizer, saved as a hub model is."""
    directory = tmp_path_factory.mktemp("language")
    words = ["<end>", "<unk>", *(f"w{i}" for i in range(22))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _generate(model: Path, *more: object, prompt: str = "w1 w2") -> list[object]:
    head = ["generate", prompt, "--model", model, "--reward", "regex:w[3-5]"]
    return [*head, "--rollouts", 30, "--max-new-tokens", 4, *more]


def test_generate_prints_samples_with_their_own_rewards(sdt, language_model):
    code, plain, noise = sdt(*_generate(language_model))
    lines = plain.splitlines()
    assert (code, noise) == (0, "") and len(lines) == 5 and "30 rollouts" in lines[-1]
    _, out, _ = sdt(*_generate(language_model, "--json"))
    records = [json.loads(line) for line in out.splitlines()]
    assert [set(record) for record in records] == [{"text", "reward", "log_prob"}] * 4
    for line, record in zip(lines, records, strict=False):
        assert line == f"[reward {record['reward']:.4g}  log p {record['log_prob']:.4g}] {record['text']}"
        assert record["reward"] == float(re.search("w[3-5]", record["text"]) is not None)
        assert record["log_prob"] < 0 and record["text"][:5] != "w1 w2"


def test_the_inverse_temperature_tilts_what_is_generated(sdt, language_model):
    def rewards(inverse_temperature: float) -> list[float]:
        options = ["--json", "--num-samples", 24, "--inverse-temperature", inverse_temperature]
        return [json.loads(line)["reward"] for line in sdt(*_generate(language_model, *options))[1].splitlines()]

    assert set(rewards(1e-9)) == {0.0, 1.0}
    assert set(rewards(50.0)) == {1.0}


def test_generate_refuses_what_it_cannot_use(mistake, language_model, tmp_path):
    assert "prompt" in mistake(*_generate(language_model, prompt=""))
    assert re.match("sdt: prompt: 30 tokens .* 32", mistake(*_generate(language_model, prompt="w1 " * 30)))
    assert "forecaster" in mistake(*_generate(Path("bundled")))
    assert "regex" in mistake(*_generate(language_model, "--reward", "spectral"))
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    assert "pickled" in mistake(*_generate(tmp_path / "pickled"))


def _without_a_weight(path: Path) -> None:
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "cannot be loaded|damaged"),
        (_without_a_weight, "lacks weights.*up_proj"),
    ],
)
def test_damaged_weights_are_refused_and_never_made_up(mistake, language_model, tmp_path, damage, words):
    for file in language_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / "model.safetensors")
    assert re.search(words, mistake(*_generate(tmp_path)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "absent.csv"], ["data", "absent.csv"]),
        (["--data", "binary.csv"], ["data", "binary.csv", "CSV"]),
        (["--device", "tpu"], ["device", "tpu", "cpu"]),
        (["--output", "binary.csv"], ["output", "binary.csv"]),
        (["--adam-lr", "nan"], ["adam_lr", "nan"]),
    ],
)
def test_a_wrong_option_of_train_forecaster_is_refused(mistake, monkeypatch, tmp_path, options, words):
    monkeypatch.chdir(tmp_path)
    Path("binary.csv").write_bytes(bytes(range(256)) * 9)
    line = mistake("train-forecaster", "--output", "run", *options)
    assert all(word in line for word in words), line
    assert not Path("run").exists()


def test_a_trained_forecaster_forecasts(sdt, plain, tmp_path):
    rows = _csv(tmp_path / "long.csv", _wave(800))
    options = ["--init", "bundled", "--data", rows, "--steps", 1, "--batch-size", 1, "--output", tmp_path / "own"]
    code, out, _ = sdt("train-forecaster", *options)
    assert code == 0 and f"--model {tmp_path / 'own'}" in out
    assert sdt(*_forecast(plain, "--model", tmp_path / "own"))[0] == 0


def test_report_writes_a_page_markdown_and_figures_of_every_run(sdt, mistake, finished, tmp_path):
    code, out, _ = sdt("report", finished, finished, "--output", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert code == 0 and "report.html" in out and (tmp_path / "report" / "report.html").is_file()
    assert text.count((finished / "config.yaml").read_text().strip()) == 2
    images = re.findall(r"!\[\w+\]\((\S+)\)", text)
    assert {Path(image).parent.as_posix() for image in images} == {"figures/run-0", "figures/run-1"}
    assert all((tmp_path / "report" / image).stat().st_size > 1000 for image in images)
    assert "samples.jsonl" in mistake("report", tmp_path)
    assert "allowed: sample, snis" in mistake("report", finished, "--method", "dts")
    assert "allowed: 0 to 1" in mistake("report", finished, "--problem", 2)


def test_the_table_fits_a_terminal_and_marks_reference_lines(sdt, finished):
    code, out, _ = sdt(*SMALL_RUN, "--resume", "--output", finished)
    table = out[out.index(" method  ") :]
    assert code == 0 and max(map(len, table[: table.index("figures in")].splitlines()[:-1])) <= 80
    assert re.search(r"method +CRPS +MASE +cov80 +specW1 +logL1 +reward +ESS +NFE +s", table)
    assert re.search(r"\n sample\* ", table) and re.search(r"\n snis ", table) and "* reference line" in table


def test_a_run_without_any_success_ends_with_one_line_and_exit_code_1(sdt, tmp_path):
    """The reward works on one series, so the check before the run passes, and on no batch of samples."""
    (tmp_path / "own.py").write_text(
        "def score(series):\n    return [0.0 if len(series) == 1 else float('nan')] * len(series)\n"
    )
    code, out, err = sdt(*SMALL_RUN, "--reward", tmp_path / "own.py:score", "--output", tmp_path / "run")
    assert code == 1 and re.fullmatch(r"sdt: every search failed, .*nan.*\n", err) and "figures" not in out


def test_a_wrong_usage_keeps_its_exit_code_and_message(sdt):
    for arguments in (["evaluate", "--nope"], ["forecast"], ["forecast", "a.csv", "--horizon", "x"], ["nope"]):
        code, _, err = sdt(*arguments)
        assert code == 2 and re.search(r"^Error: .*(No such|Missing|Invalid)", err, re.MULTILINE), err


def test_ctrl_c_ends_with_130_and_says_what_is_kept(tmp_path):
    """A real SIGINT, which the reward sends while the run tries it."""
    (tmp_path / "own.py").write_text("import os, signal\ndef score(series):\n    os.kill(os.getpid(), signal.SIGINT)\n")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT)!r}); from cluster.cli import main\n"
        f"sys.argv = ['sdt', *{SMALL_RUN!r}, '--reward', 'own.py:score']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == "sdt: stopped; finished work is kept, and --resume goes on from it.\n"
