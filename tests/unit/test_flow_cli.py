"""`--flow`: one line and exit code 2 for a flow that cannot be used, before a model loads; plans and results name it.

See docs/reference/cli.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from sdt_dist.actors.config import fleet_config
from sdt_dist.cluster.cli import main
from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.evaluation.directory import RunDirectory
from sdt_dist.evaluation.plan import Plan, load_config, make_plan, resolve
from sdt_dist.evaluation.runner import run_evaluation
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.card import ModelCard, card_of
from sdt_dist.models.loading import load_model
from sdt_dist.models.toy import Toy
from tests.evaluation_helpers import evaluate_into
from tests.flow_helpers import save_small_flow

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = {
    "num_problems": 2,
    "num_rollouts": 4,
    "horizon": 8,
    "context_length": 64,
    "num_samples": 4,
    "wave_size": 2,
}
FLOW_RUN = {**RUN, "num_problems": 1, "methods": ["snis", "snis+flow", "s_adt"]}
EVALUATE = ["evaluate", "--num-problems", "2", "--rollouts", "4", "--horizon", "8"]


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return card_of(load_model("bundled"), "bundled")


@pytest.fixture(scope="module")
def flow(tmp_path_factory, card) -> Path:
    """A flow of the bundled forecaster, for horizons up to 8."""
    directory = tmp_path_factory.mktemp("flow") / "flow"
    save_small_flow(directory, card, 8)
    return directory


@pytest.fixture
def mistake(early_mistake):
    """Every mistake here is told before a model loads."""
    return early_mistake


def _evaluate(methods: str, flow: object, *more: object) -> list[object]:
    return [*EVALUATE, "--methods", methods, "--flow", flow, *more, "--output", "absent"]


def test_flows_that_fit_nothing_are_refused_before_a_model_loads(
    mistake, flow, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sdt_dist.evaluation.plan.cut_problems",
            lambda *_, **__: pytest.fail("data were loaded"),
        )
        cases = [
            (
                ["s_adt", "absent"],
                "flow: absent is no directory; give the directory of a flow's checkpoint",
            ),
            (
                ["s_adt", tmp_path],
                "flow.json cannot be read (No such file or directory); give a whole checkpoint",
            ),
            (
                ["s_adt", flow, "--reward", "nonneg"],
                "flow: trained for reward 'spectral:gamma=1', given 'nonneg'; give",
            ),
            (
                ["s_adt", flow, "--inverse-temperature", 21],
                "inverse_temperature: 21.0, the flow was trained for 0.5 to 20",
            ),
            (
                ["s_adt", flow, "--horizon", 9],
                "flow: trained for up to 8 new tokens (a forecast's horizon), asked for 9",
            ),
            (
                ["snis,smc", flow],
                "but none of the methods snis, smc uses it; add s_adt, snis+flow or smc+flow",
            ),
            (
                ["dts+flow", flow],
                "flow: given, but method 'dts' does not use one; allowed with s_adt, smc and snis",
            ),
            (
                ["s_adt", flow, "--model", "vllm:some/name"],
                "'vllm:some/name' cannot hold flow networks",
            ),
        ]
        for arguments, words in cases:
            assert words in mistake(*_evaluate(*arguments)), arguments
        for methods, label in [("s_adt", "s_adt"), ("snis,snis+flow", "snis+flow")]:
            line = mistake(*EVALUATE, "--methods", methods)
            assert f"methods: {label} needs a flow; give --flow PATH or leave it out." in line
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_checkpoints_are_refused(mistake, flow, tmp_path):
    info = (flow / "flow.json").read_text()
    weights = (flow / "model.safetensors").read_bytes()
    changed = bytearray(weights)
    changed[-1] ^= 1
    cases = {
        "cut": (info, weights[:-9], "model.safetensors cannot be read"),
        "changed": (
            info,
            bytes(changed),
            "the files of two versions, or damage; save the flow again",
        ),
        "foreign": (
            '{"format": "sdt-forecaster/1"}',
            weights,
            "has format 'sdt-forecaster/1', allowed: 'sdt-flow/1'",
        ),
        "no JSON": ("{", weights, "flow.json cannot be read (Expecting property name"),
        "a list": ("[]", weights, "has format 'list', allowed: 'sdt-flow/1'"),
    }
    for name, (text, body, words) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "flow.json").write_text(text)
        (folder / "model.safetensors").write_bytes(body)
        assert words in mistake(*_evaluate("s_adt", folder)), name
    assert "no directory" in mistake(
        "serve", "--flow", tmp_path / "absent", "--token-file", tmp_path / "token"
    )
    assert "cannot hold flow" in mistake("serve", "--model", "vllm:a/b", "--flow", flow)


def test_method_entries_say_whether_they_use_the_flow(flow):
    values = {
        "methods": ["s_adt", "snis", "smc+flow", {"name": "snis", "label": "with F", "flow": True}]
    }
    plan = _resolved({**RUN, **values, "flow": str(flow)})
    assert [(m.label, m.flow is not None) for m in plan.methods] == [
        ("s_adt", True), ("snis", False), ("smc+flow", True), ("with F", True),
    ]  # fmt: skip
    with pytest.raises(
        ConfigurationError,
        match="methods: s_adt has flow: false, but s_adt needs one; leave flow out",
    ):
        _resolved({**RUN, "methods": [{"name": "s_adt", "flow": False}], "flow": str(flow)})
    own = {"name": "s_adt", "options": {"inverse_temperature": 30}}
    with pytest.raises(
        ConfigurationError, match=r"inverse_temperature: 30, the flow was trained for 0\.5 to 20"
    ):
        _resolved({**RUN, "methods": [own], "flow": str(flow)})
    own = {"name": "s_adt", "reward": "nonneg"}
    with pytest.raises(
        CheckpointError, match="flow: trained for reward 'spectral:gamma=1', given 'nonneg'"
    ):
        _resolved({**RUN, "methods": [own], "flow": str(flow)})
    swept = {**RUN, "methods": ["s_adt"], "flow": str(flow)}
    plan = _resolved(swept | {"ablate": {"gamma": [1], "alpha": [0, 0.5], "lambda": [1, 3]}})
    assert [method.flow for method in plan.methods] == [plan.flow.identity] * 4
    with pytest.raises(CheckpointError, match="given 'spectral:gamma=2'"):
        _resolved(swept | {"ablate": {"gamma": [1, 2]}})


def _resolved(settings: dict) -> Plan:
    return resolve(load_config(None, settings))


def test_a_dry_run_shows_the_flow_and_loads_nothing(flow, monkeypatch, capsys):
    monkeypatch.setattr(
        "sdt_dist.flow.flow.Flow.of", lambda *_: pytest.fail("the network was built")
    )
    monkeypatch.setattr(
        "sdt_dist.models.loading.load_model", lambda *_: pytest.fail("a model was loaded")
    )
    monkeypatch.setattr(
        sys, "argv", ["sdt", *map(str, _evaluate("snis,s_adt,smc+flow", flow)), "--dry-run"]
    )
    with pytest.raises(SystemExit) as done:
        main()
    out = capsys.readouterr().out
    assert not done.value.code
    assert f"flow: version 0 of {flow}, used by s_adt, smc+flow\n" in out
    assert f"flow: {flow}\n" in out and "flow_identity: " in out


def test_a_fleet_with_servers_that_hold_no_flows_is_refused(mistake, flow, tmp_path):
    (tmp_path / "fleet.yaml").write_text(
        "more_servers: [{model: bundled}, {model: 'vllm:/models/x'}]\n"
    )
    line = mistake(*_evaluate("s_adt", flow, "--fleet", tmp_path / "fleet.yaml"))
    assert (
        "more_servers.1: flow: given, but model 'vllm:/models/x' cannot hold flow networks" in line
    )
    fleet_config(
        {"more_servers": [{"model": "mlx:/models/x"}, {"model": "http://127.0.0.1:8011"}]}
    ).check_flows()


def test_an_evaluation_names_its_flow_and_is_resumed_with_no_other(flow, card, tmp_path, mistake):
    own = tmp_path / "own"
    output = tmp_path / "run"
    shutil.copytree(flow, own)
    values = {**FLOW_RUN, "flow": str(own)}
    plan = make_plan(load_config(None, values))
    identity = plan.config.flow_identity
    run_evaluation(plan, RunDirectory(output, plan))
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert {(line["label"], line["flow"], line["status"]) for line in lines} == {
        ("snis", None, "ok"), ("snis+flow", identity, "ok"), ("s_adt", identity, "ok"),
    }  # fmt: skip
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert (saved["flow"], saved["flow_identity"]) == (str(own), identity)
    assert _resolved(saved).config == plan.config

    RunDirectory(output, make_plan(load_config(None, {**values, "flow": str(flow)})), resume=True)
    save_small_flow(own, card, 8, seed=1)
    line = mistake(*_resume(output, own))
    assert f"holds results of another configuration (flow_identity: '{identity}', now " in line
    with pytest.raises(CheckpointError, match=f"flow_identity is {identity}; give that flow"):
        _resolved(saved)


def _resume(output: Path, flow: Path) -> list[object]:
    """The command of `FLOW_RUN` in an output directory."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(FLOW_RUN))
    return ["evaluate", path, "--flow", flow, "--output", output, "--resume"]


def test_a_flow_of_another_model_is_refused_before_the_first_search(tmp_path, card):
    save_small_flow(tmp_path / "flow", replace(card, identity="f" * 32), 8)
    config = load_config(
        None, {**RUN, "methods": ["snis", "s_adt"], "flow": str(tmp_path / "flow")}
    )
    with pytest.raises(
        CheckpointError,
        match=f"flow: trained for model {'f' * 32}, 'bundled' is {card.identity}; give",
    ):
        evaluate_into(tmp_path / "run", config)
    save_small_flow(tmp_path / "toy", card_of(Toy(5, 8, 1.0)), 8)
    config = load_config(None, {**RUN, "methods": ["s_adt"], "flow": str(tmp_path / "toy")})
    with pytest.raises(
        CheckpointError, match="flow: vocab_size 5, model 'bundled' has 1024; give the model"
    ):
        evaluate_into(tmp_path / "other", config)


@pytest.fixture
def series(tmp_path) -> Path:
    path = tmp_path / "series.csv"
    wave = 10 + np.sin(np.arange(120) / 4) + 0.1 * np.random.default_rng(0).standard_normal(120)
    pd.DataFrame({"load": wave}).to_csv(path, index=False)
    return path


def test_forecast_and_generate_refuse_flows_before_a_model_loads(mistake, flow, series):
    forecast = ["forecast", series, "--horizon", 8]
    assert "'s_adt': it needs a flow network; give one (--flow PATH" in mistake(
        *forecast, "--method", "s_adt"
    )
    assert "method 'dts' does not use one" in mistake(*forecast, "--method", "dts", "--flow", flow)
    assert "trained for up to 8 new tokens" in mistake(
        "forecast", series, "--horizon", 9, "--flow", flow
    )
    assert "the flow was trained for 0.5 to 20" in mistake(
        *forecast, "--inverse-temperature", 0.1, "--flow", flow
    )
    generate = ["generate", "x", "--model", "bundled", "--reward", "regex:a", "--method"]
    assert "'s_adt': it needs a flow network; give one (--flow PATH" in mistake(*generate, "s_adt")
    assert "trained for reward 'spectral:gamma=1', given 'regex:a'" in mistake(
        *generate, "s_adt", "--flow", flow
    )


def test_a_forecast_with_a_flow(flow, series, monkeypatch, capsys):
    def run(*more: object) -> str:
        command = [
            "sdt",
            "forecast",
            series,
            "--horizon",
            8,
            "--rollouts",
            8,
            "--num-samples",
            8,
            *more,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code
        return capsys.readouterr().out

    with_flow = run("--method", "s_adt", "--flow", flow)
    assert with_flow.count("\n") == 9 and with_flow != run("--method", "residual_ts")


def test_serve_gives_its_model_the_flows_and_says_so(flow, card, tmp_path, monkeypatch):
    services = []
    monkeypatch.setattr(
        "sdt_dist.cluster.commands.serve._run", lambda service, *_: services.append(service)
    )
    save_small_flow(tmp_path / "second", card, 8, seed=1)
    save_small_flow(tmp_path / "foreign", replace(card, identity="f" * 32), 8)

    def run(*flows: Path) -> object:
        given = [word for path in flows for word in ("--flow", path)]
        command = ["sdt", "serve", "--token-file", tmp_path / "token", *given]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code

    assert not run(flow, tmp_path / "second")
    (service,) = services
    held = [FlowFiles.read(path).identity for path in (flow, tmp_path / "second")]
    assert list(service.flows) == list(service.server.model._flows._flows) == held
    assert run(tmp_path / "foreign") == 2 and len(services) == 1
