"""The `sdt` command and its evaluate, generate and report: one line and exit code 2 for a mistake, and what they print.

See docs/reference/cli.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdt_dist.cluster.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "evaluate", "forecast", "generate", "train-forecaster", "train-flow", "tune", "report", "doctor", "serve", "cluster",
]  # fmt: skip
SMALL_RUN = [
    "evaluate", "--methods", "sample,snis", "--num-problems", "2", "--rollouts", "4", "--horizon", "8",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


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
def test_a_wrong_setting_names_the_field_the_value_and_what_is_allowed(
    mistake, tmp_path, settings, words
):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    line = mistake("evaluate", tmp_path / "run.yaml", "--output", tmp_path / "run")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_fleet_with_an_unknown_backend_is_refused_before_anything_starts(mistake, tmp_path):
    (tmp_path / "fleet.yaml").write_text("more_servers: [{model: 'mxl:/models/x'}]\n")
    line = mistake(*SMALL_RUN, "--fleet", tmp_path / "fleet.yaml", "--output", tmp_path / "run")
    assert all(
        word in line for word in ["more_servers.0.model", "'mxl:/models/x'", "Did you mean 'mlx'?"]
    ), line
    assert not (tmp_path / "run").exists()


def test_an_unusable_configuration_file_is_refused(mistake, tmp_path):
    assert "absent.yaml" in mistake("evaluate", tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- horizon\n")
    assert "mapping" in mistake("evaluate", tmp_path / "list.yaml")
    for text in (
        b"horizon: [1\n",
        b"horizon: \xff\n",
        b"a: b: c\n",
        b"horizon: 8\n\x00",
        b"{[1]: 2}\n",
    ):
        (tmp_path / "bad.yaml").write_bytes(text)
        assert "not YAML in UTF-8" in mistake("evaluate", tmp_path / "bad.yaml")


def test_a_directory_with_other_results_is_refused(mistake, finished):
    before = (finished / "samples.jsonl").read_bytes()
    assert "--resume" in mistake(*SMALL_RUN, "--output", finished)
    assert "seed" in mistake(*SMALL_RUN, "--seed", 1, "--resume", "--output", finished)
    assert (finished / "samples.jsonl").read_bytes() == before


def test_an_output_that_cannot_be_written_is_refused(mistake, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "cannot be written" in mistake(*SMALL_RUN, "--output", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_help_lists_the_commands_and_shows_examples(sdt):
    code, out, _ = sdt("--help")
    assert (
        code == 0
        and all(command in out for command in COMMANDS)
        and re.search(r"Example:\s+sdt evaluate ", out)
    )
    for command in COMMANDS:
        code, out, _ = sdt(command, "--help")
        assert code == 0 and re.search(rf"Examples?:\s+sdt {command}\b", out), command


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A randomly initialised Llama and its word tokenizer, saved as a hub model is."""
    directory = tmp_path_factory.mktemp("language")
    words = ["<end>", "<unk>", *(f"w{i}" for i in range(22))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(directory)
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
        assert (
            line
            == f"[reward {record['reward']:.4g}  log p {record['log_prob']:.4g}] {record['text']}"
        )
        assert record["reward"] == float(re.search("w[3-5]", record["text"]) is not None)
        assert record["log_prob"] < 0 and record["text"][:5] != "w1 w2"


def test_the_inverse_temperature_tilts_what_is_generated(sdt, language_model):
    def rewards(inverse_temperature: float) -> list[float]:
        options = ["--json", "--num-samples", 24, "--inverse-temperature", inverse_temperature]
        return [
            json.loads(line)["reward"]
            for line in sdt(*_generate(language_model, *options))[1].splitlines()
        ]

    assert set(rewards(1e-9)) == {0.0, 1.0}
    assert set(rewards(50.0)) == {1.0}


def test_generate_refuses_what_it_cannot_use(mistake, language_model, tmp_path):
    assert "prompt" in mistake(*_generate(language_model, prompt=""))
    assert re.match(
        "sdt: prompt: 30 tokens .* 32", mistake(*_generate(language_model, prompt="w1 " * 30))
    )
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
def test_damaged_weights_are_refused_and_never_made_up(
    mistake, language_model, tmp_path, damage, words
):
    for file in language_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / "model.safetensors")
    assert re.search(words, mistake(*_generate(tmp_path)))


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
    assert (
        re.search(r"\n sample\* ", table)
        and re.search(r"\n snis ", table)
        and "* reference line" in table
    )


def test_the_bar_of_an_evaluation_is_on_stderr(sdt, finished, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes both streams for terminals
    code, out, err = sdt(*SMALL_RUN, "--resume", "--output", finished)
    assert code == 0 and "━" in err and "0:00:0" in err
    assert "━" not in out and "0:00:0" not in out and "figures in" in out


def test_a_run_without_any_success_ends_with_one_line_and_exit_code_1(sdt, tmp_path):
    """The reward works on one series, so the check before the run passes, and on no batch of samples."""
    (tmp_path / "own.py").write_text(
        "def score(series):\n    return [0.0 if len(series) == 1 else float('nan')] * len(series)\n"
    )
    code, out, err = sdt(
        *SMALL_RUN, "--reward", tmp_path / "own.py:score", "--output", tmp_path / "run"
    )
    assert (
        code == 1
        and re.fullmatch(r"sdt: every search failed, .*nan.*", err.splitlines()[-1])
        and "figures" not in out
    )


def test_a_wrong_usage_keeps_its_exit_code_and_message(sdt):
    for arguments in (
        ["evaluate", "--nope"],
        ["forecast"],
        ["forecast", "a.csv", "--horizon", "x"],
        ["nope"],
    ):
        code, _, err = sdt(*arguments)
        assert code == 2 and re.search(r"^Error: .*(No such|Missing|Invalid)", err, re.MULTILINE), (
            err
        )


def test_ctrl_c_ends_with_130_and_says_what_is_kept(tmp_path):
    """A real SIGINT, which the reward sends while the run tries it."""
    (tmp_path / "own.py").write_text(
        "import os, signal\ndef score(series):\n    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT)!r}); from sdt_dist.cluster.cli import main\n"
        f"sys.argv = ['sdt', *{SMALL_RUN!r}, '--reward', 'own.py:score']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 130
    assert done.stderr == "sdt: stopped; finished work is kept, and --resume goes on from it.\n"
