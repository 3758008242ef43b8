"""`sdt train-flow`: killed by SIGKILL it goes on exactly, from saved trees and in rounds; what it refuses and writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdt_dist.flow.checkpoint import FlowInfo
from sdt_dist.flow.flow import Flow
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.process import TokenProcess
from sdt_dist.search.session import SearchProblem
from sdt_dist.training.flow.config import TrainFlowConfig
from sdt_dist.training.flow.learner import LOSSES_FILE, Learner
from sdt_dist.training.flow.loss_log import read_losses
from sdt_dist.training.flow.train import LiveSearches, Watch, run_rounds
from sdt_dist.training.flow.versions import latest_version
from sdt_dist.tree.snapshot import Snapshot
from tests.evaluation_helpers import evaluate_into
from tests.flow_helpers import FamilyMember, sibling_groups

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
SMALL = [
    "train-flow", "--max-new-tokens", 4, "--rounds", 2, "--steps-per-round", 8, "--hidden-size", 8, "--key-size", 4,
    "--num-children", 6, "--set", "num_contexts=2", "--set", "save_every=3", "--set", "calibrate_every=4",
]  # fmt: skip
ROUNDS = [
    *SMALL, "--contexts-per-round", 2, "--rollouts", 4, "--lowest-inverse-temperature", 2, "--set", "held_out_contexts=2",
    "--set", "rounds_ahead=1", "--set", "path_steps=5",
]  # fmt: skip
KILLED_AT = 14  # a step of the second round, after its state was saved at step 12
DYING = f"""
import os, signal, sys
from sdt_dist.training.flow.loss_log import LossLog
append = LossLog.append
def die(self, line):
    append(self, line)
    if line["step"] == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
LossLog.append = die
from sdt_dist.cluster.cli import main
main()
"""


@pytest.fixture
def mistake(early_mistake):
    """Every mistake here is told before a model loads."""
    return early_mistake


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that kept a tree, and the evidence of both of its problems."""
    directory = tmp_path_factory.mktemp("searched") / "run"
    settings = {
        "horizon": 4,
        "num_problems": 2,
        "methods": ["residual_ts"],
        "num_rollouts": 12,
        "num_samples": 4,
    }
    evaluate_into(directory, {**settings, "keep_evidence": True})
    return directory


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Llama and its word tokenizer."""
    directory = tmp_path_factory.mktemp("language")
    words = ["<end>", "<unk>", *(f"w{i}" for i in range(14))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def killed_then_resumed(sdt: Any, arguments: list[object], directory: Path) -> None:
    """The command, killed for good by a signal in its second round, and again with --resume."""
    whole = [*arguments, "--output", directory]
    done = subprocess.run(
        [sys.executable, "-c", DYING, *map(str, whole)], cwd=ROOT, env=os.environ, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert len(read_losses(directory / LOSSES_FILE)) == KILLED_AT
    assert (latest_version(directory) or (0,))[0] == 1
    code, out, _ = sdt(*whole, "--resume")
    assert code == 0 and f"flow: {directory} (version 2, 16 steps" in out


def check_equal(directory: Path, whole: Path) -> None:
    assert (directory / LOSSES_FILE).read_bytes() == (whole / LOSSES_FILE).read_bytes()
    assert [line["step"] for line in read_losses(whole / LOSSES_FILE)] == list(range(1, 17))
    assert Flow.load(directory).identity == Flow.load(whole).identity
    cards = [json.loads((path / "card.json").read_text()) for path in (directory, whole)]
    assert cards[0] == cards[1]


def test_a_training_in_rounds_killed_by_sigkill_goes_on_exactly(sdt, tmp_path):
    assert sdt(*ROUNDS, "--output", tmp_path / "whole")[0] == 0
    killed_then_resumed(sdt, ROUNDS, tmp_path / "killed")
    check_equal(tmp_path / "killed", tmp_path / "whole")
    card = json.loads((tmp_path / "whole" / "card.json").read_text())
    *ahead, last = card["rounds"]
    assert [[facts["method"] for facts in found] for found in ahead] == [["residual_ts"]] * 2
    assert [facts["method"] for facts in last] == ["residual_ts", "s_adt"]
    assert [facts["trajectories"] for facts in last] == [4, 4]
    by_path = [
        sorted(name for name in line if name.startswith("loss/"))
        for line in read_losses(tmp_path / "whole" / LOSSES_FILE)
    ]
    assert by_path[:5] == [["loss/path", "loss/total"]] * 5 and "loss/bellman" in by_path[5]
    assert (
        card["inverse_temperatures"] == [2.0, 8.0]
        and card["version"] == 2
        and "synthetic" in card["data"]
    )
    assert {"loss/total", "log_z", "calibration/tree_correlation"} <= card["curves"].keys()
    one, other = card["held_out"]
    assert one["prior"] == other["prior"] > 0 and one["flow"] != other["flow"]
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10_000


def test_a_training_on_saved_trees_killed_by_sigkill_goes_on_exactly(
    sdt, mistake, searched, tmp_path
):
    arguments = [*SMALL, "--trees", searched]
    assert sdt(*arguments, "--output", tmp_path / "whole")[0] == 0
    killed_then_resumed(sdt, arguments, tmp_path / "killed")
    check_equal(tmp_path / "killed", tmp_path / "whole")
    card = json.loads((tmp_path / "whole" / "card.json").read_text())
    assert [[facts["new"] for facts in harvests] for harvests in card["rounds"]] == [
        [12, 0, 12],
        [],
    ]
    assert card["spec"]["max_new_tokens"] == 4 and str(searched) in card["data"]
    assert "calibration/tree_rms_error" in card["curves"]

    line = mistake(*arguments, "--output", tmp_path / "whole")
    assert "already holds a training; add --resume" in line
    line = mistake(*arguments, "--learning-rate", 0.1, "--output", tmp_path / "whole", "--resume")
    assert "another configuration (learning_rate: 0.003, now 0.1)" in line
    whole = (tmp_path / "whole" / "training.safetensors").read_bytes()
    (tmp_path / "whole" / "training.safetensors").write_bytes(whole[:40])
    assert "cannot be read" in mistake(*arguments, "--output", tmp_path / "whole", "--resume")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "learning_rat=1"], ["learning_rat", "Did you mean 'learning_rate'"]),
        (["--set", "rounds"], ["--set", "NAME=VALUE"]),
        (["--set", "rtb=[}"], ["--set", "YAML"]),
        (["--rounds", 0], ["rounds: 0", "greater than or equal to 1"]),
        (
            ["--set", "held_out_contexts=2", "--dataset", "classic"],
            ["held_out_contexts", "dataset", "leave one out"],
        ),
        (["--set", "rounds_ahead=2", "--live"], ["rounds_ahead", "live"]),
        (
            ["--set", "path_steps=16", "--rounds", 2, "--steps-per-round", 8],
            ["path_steps", "below the 16 steps"],
        ),
        (["--flow-share", 2], ["flow_share: 2.0", "less than or equal to 1"]),
        (["--lowest-inverse-temperature", 9], ["must not exceed highest_inverse_temperature"]),
        (
            ["--lowest-inverse-temperature", -1],
            ["lowest_inverse_temperature: -1", "greater than 0"],
        ),
        (["--model", "bundeld"], ["bundeld", "Did you mean 'bundled'"]),
        (["--reward", "spectrl"], ["spectrl", "Did you mean 'spectral'"]),
        (["--reward", "regex:a"], ["regex:a", "scores series"]),
        (["--max-new-tokens", 3], ["horizon 3", ">= 4"]),
        (["--method", "residul_ts"], ["residul_ts", "Did you mean 'residual_ts'"]),
        (["--method", "s_adt"], ["s_adt", "needs a flow"]),
        (["--method", "sample"], ["sample", "no budget"]),
        (["--flow-method", "dts"], ["dts", "does not use one"]),
        (["--set", "method_options={epsilon: 2}"], ["epsilon: 2", "less than or equal to 1"]),
        (["--dataset", "clasic"], ["clasic", "Did you mean 'classic'"]),
        (["--prompts", "p.txt"], ["prompts", "is a forecaster"]),
        (
            ["--dataset", "classic", "--prompts", "p.txt"],
            ["dataset and prompts exclude each other"],
        ),
        (["--end-row", 5], ["end_row is given without a dataset"]),
        (["--searchers", 2], ["--searchers: given without --live"]),
        (["--fleet", "f.yaml"], ["--fleet: given without --live"]),
        (["--set", "steps_per_trajectory=1"], ["steps_per_trajectory is given without live"]),
        (["--live", "--trees", "."], ["trees and live exclude each other"]),
        (["--live", "--servers", 0], ["servers: 0", "greater than or equal to 1"]),
        (["--live", "--device", "cuda"], ["learner_gpus is 0"]),
        (["--trees", "absent"], ["trees: absent does not exist"]),
        (["absent"], ["'absent' is not expected"]),
        (["--trees", "."], ["config.yaml", "no configuration"]),
        (["--config", "absent.yaml"], ["absent.yaml", "cannot be read"]),
    ],
)
def test_a_mistake_is_told_before_anything_starts(mistake, monkeypatch, tmp_path, options, words):
    monkeypatch.chdir(tmp_path)
    line = mistake("train-flow", "--output", "run", *options)
    assert all(word in line for word in words), line
    assert not Path("run").exists()


def test_trees_of_other_weights_are_refused(sdt, searched, tmp_path):
    """The rows of p are compared with the tree's, where its own record says the same model."""
    other = tmp_path / "other"
    shutil.copytree(searched, other)
    shutil.rmtree(other / "evidence")
    (path,) = (other / "trees").iterdir()
    snapshot = Snapshot.load(path)
    snapshot.tree.nodes["log_prior"][1:] -= 0.2
    snapshot.save(path)
    code, _, err = sdt(*SMALL, "--trees", other, "--num-children", 0, "--output", tmp_path / "run")
    assert code == 2 and "searched with other weights of the model" in err


def test_trees_of_something_else_are_refused(mistake, searched, tmp_path):
    run = ["train-flow", "--output", tmp_path / "run", "--trees", searched]
    assert "searches for reward 'spectral:gamma=1', not for 'nonneg'" in mistake(
        *run, "--reward", "nonneg"
    )
    assert "trees are of 4 tokens" in mistake(*run, "--max-new-tokens", 8)
    assert "trees and dataset exclude each other" in mistake(*run, "--dataset", "classic")
    other = tmp_path / "other"
    (other / "trees").mkdir(parents=True)
    config = yaml.safe_load((searched / "config.yaml").read_text())
    for changes, words in (
        ({"model": "some/model"}, "searches of model 'some/model', not of 'bundled'"),
        ({"horizon": 8}, "has horizon 4"),
    ):
        (other / "trees" / "t.npz").touch()
        (other / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
        assert words in mistake(*run, other)
    (other / "trees" / "t.npz").unlink()
    assert "holds no trees" in mistake(*run, other)


def test_a_foreign_output_directory_is_refused(mistake, searched):
    line = mistake(*ROUNDS, "--output", searched)
    assert "no training.safetensors" in line and "give a new directory" in line


def test_settings_come_from_a_file_and_options_override_it(sdt, mistake, tmp_path):
    (tmp_path / "flow.yaml").write_text("rounds: 1\nseed: -1\n")
    assert "seed: -1" in mistake(
        "train-flow", "--config", tmp_path / "flow.yaml", "--output", tmp_path / "run"
    )


def test_prompts_of_a_language_model(sdt, mistake, language_model, tmp_path):
    """Samples of a method without a tree, some of which end by the end token, and then with the flow."""
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3\nw4 w5 w6\n")
    arguments = [
        *SMALL,
        "--model",
        language_model,
        "--reward",
        "regex:w[3-9]",
        "--method",
        "snis",
        "--flow-method",
        "snis",
    ]
    assert "is a language model; give a file" in mistake(*arguments, "--output", tmp_path / "run")
    arguments += [
        "--rollouts",
        6,
        "--contexts-per-round",
        2,
        "--prompts",
        tmp_path / "prompts.txt",
        "--output",
    ]
    code, out, _ = sdt(*arguments, tmp_path / "run")
    assert code == 0 and "version 2" in out
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert card["data"] == "3 prompts of prompts.txt" and [
        len(harvests) for harvests in card["rounds"]
    ] == [1, 2]
    (tmp_path / "prompts.txt").write_text("\n")
    assert sdt(*arguments, tmp_path / "again")[2].startswith("sdt: prompts: ")


class Members:
    """The same few members of the family of toys, every round."""

    description = "members"

    def draw(self, seed: int, round_number: int, count: int) -> list[Any]:
        rng = np.random.default_rng(5)
        return [tuple(rng.integers(0, 5, 5).tolist()) for _ in range(count)]


def test_rounds_on_toys_learn_soft_values(tmp_path):
    """Five rounds of live searches, the later ones with the newest flow: F ranks the children of all states as V does."""
    config = TrainFlowConfig(
        rounds=5, steps_per_round=60, contexts_per_round=4, rollouts=40, num_children=None, learning_rate=0.005,
        num_contexts=4, per_context=8, lowest_inverse_temperature=2.0, highest_inverse_temperature=8.0,
        calibrate_every=60, contrastive=0.0, rtb=1.0, bellman=1.0, terminal=1.0, tie=1.0,
    )  # fmt: skip
    model = FamilyMember((0,) * 5)
    process = TokenProcess(model, model.law, model.length)
    source = LiveSearches(
        config,
        process,
        Members(),
        lambda i, prompt: SearchProblem(i, process.root(prompt), FamilyMember(prompt)),
    )
    spec = FlowSpec(5, (0, 5), 4, context_length=5, patch=5, hidden_size=32)
    info = FlowInfo("family", "toy", (1.0, 1.0))
    learner = Learner.open(tmp_path / "run", spec, info, config.training(), config.learner())
    run_rounds(learner, source, config, Watch())
    learner.close()
    flow = learner.flow()
    rhos = []
    assert flow is not None and flow.info.version == 5
    for prompt in Members().draw(0, 0, 4):
        member = FamilyMember(prompt)
        root = process.root(prompt)
        groups = sibling_groups(member)
        rows = np.stack(
            [member.log_prob_tables[len(prefix)][member.index(prefix)] for prefix, _ in groups]
        )
        tilts = flow.log_tilts(
            [(root, prefix) for prefix, _ in groups], member.inverse_temperature, rows
        )
        rhos += [
            spearmanr(t, v).statistic
            for t, (_, v) in zip(tilts, groups, strict=True)
            if np.ptp(v) > 1e-9
        ]
    print(f"rank correlation with V among siblings: {np.mean(rhos):.3f}")
    assert np.mean(rhos) > 0.9
    assert learner.metrics["calibration/tree_correlation"] > 0.75
