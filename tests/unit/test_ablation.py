"""Ablations: what is parsed and refused, matched budgets, and points that are the runs they stand for.

See docs/guides/evaluate.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from sdt_dist.cluster.cli import main
from sdt_dist.errors import ConfigurationError, ResultsError
from sdt_dist.evaluation.ablation import expanded, parse_ablations
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.evaluation.executor import InProcess
from sdt_dist.evaluation.labels import family, middle
from sdt_dist.evaluation.method_options import matched_budget, options_of
from sdt_dist.evaluation.plan import load_config, make_plan, resolve
from sdt_dist.models.loading import load_model
from tests.evaluation_helpers import evaluate_into

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "num_problems": 2, "horizon": 8, "context_length": 64, "num_rollouts": 8, "num_samples": 6, "wave_size": 4,
}  # fmt: skip
SWEPT = {
    **SETTINGS,
    "methods": ["sample", "residual_ts"],
    "ablate": {"rollouts": [4, 8], "lambda": [1, 3]},
}


@pytest.fixture(scope="module")
def evaluate():
    model = load_model("bundled")

    def run(directory: Path, settings: dict, **options) -> dict[tuple[int, str], dict]:
        evaluate_into(directory, settings, executor=InProcess(lambda _: model), **options)
        return _lines(directory)

    return run


@pytest.fixture(scope="module")
def swept(tmp_path_factory, evaluate) -> Path:
    directory = tmp_path_factory.mktemp("swept") / "run"
    evaluate(directory, SWEPT)
    return directory


def _lines(directory: Path) -> dict[tuple[int, str], dict]:
    lines = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    return {(line["problem"], line["label"]): line for line in lines}


def _of(lines: dict[tuple[int, str], dict], label: str) -> list[dict]:
    """A label's lines by problem, without its name and the time."""
    return [
        {k: v for k, v in line.items() if k not in ("label", "wall_s")}
        for line in lines.values()
        if line["label"] == label
    ]


def _labels(methods: list, ablate: dict) -> list[str]:
    return [
        m.label
        for m in load_config(
            None, SETTINGS | {"methods": methods, "ablate": ablate}
        ).method_configs()
    ]


def test_items_are_parameters_with_their_values():
    assert parse_ablations(["rollouts=5,10, 20", "lambda = 0.5,1e-1"]) == {
        "rollouts": [5, 10, 20],
        "lambda": [0.5, 0.1],
    }
    assert parse_ablations([]) == {}


def test_every_method_is_at_every_point_of_what_it_has_and_no_other():
    ablate = {"rollouts": [5, 10], "inverse_temperature": [1, 2.5], "expansion_k": [2, 4]}
    assert _labels(["sample", "mcts", "snis", "best_of_n"], ablate) == [
        "sample",
        *(f"mcts[rollouts={r},expansion_k={k}]" for r in (5, 10) for k in (2, 4)),
        *(f"snis[rollouts={r},lambda={v}]" for r in (5, 10) for v in ("1", "2.5")),
        "best_of_n[rollouts=5]",
        "best_of_n[rollouts=10]",
    ]
    assert _labels(["greedy", "beam", "snis"], {"gamma": [0, 1]}) == [
        "greedy",
        "beam",
        "snis[gamma=0]",
        "snis[gamma=1]",
    ]
    own = {"name": "dts", "label": "mine", "options": {"wave_size": 2}}
    assert _labels([own, "snis"], {"block_size": [2]}) == ["mine[block_size=2]", "snis"]


def test_a_point_changes_its_options_or_reward_alone():
    own = {"name": "maxent_ts", "label": "mine", "options": {"wave_size": 2}}
    ablate = {"rollouts": [5], "lambda": [2], "gamma": [3], "expansion_k": [4]}
    config = load_config(None, SETTINGS | {"methods": [own], "ablate": ablate})
    (point,) = config.method_configs()
    plain = load_config(
        None, SETTINGS | {"methods": [own], "num_rollouts": 5, "inverse_temperature": 2.0}
    )
    (want,) = plain.method_configs()
    assert options_of(config, point) == options_of(plain, want) | {"expansion_k": 4}
    assert config.reward_of(point) == "spectral:gamma=3"
    assert (
        family(point) == "mine"
        and family(point, "rollouts", "gamma") == "mine[lambda=2,expansion_k=4]"
    )


@pytest.mark.parametrize(
    ("ablate", "message"),
    [
        (["rollouts"], "'rollouts', allowed: parameter=value"),
        (["rollouts=5", "rollouts=6"], "rollouts is given twice"),
        (["rollouts=5,x"], "rollouts='x', allowed: numbers"),
        (["rollouts="], "rollouts='', allowed: numbers"),
        (["rolouts=5"], "unknown parameter of ablate 'rolouts'. Did you mean 'rollouts'"),
        (
            ["lambda=1", "inverse_temperature=2"],
            "lambda is given twice, as inverse_temperature too",
        ),
        (["lambda=1,1.0"], r"lambda=\[1, 1.0\], allowed: one or more values, each of them once"),
        (["rollouts=0"], r"ablate: residual_ts\[rollouts=0\]: .*num_rollouts: 0"),
        (["rollouts=2.5"], r"ablate: residual_ts\[rollouts=2.5\]: .*num_rollouts: 2.5"),
        (["lambda=-1"], r"ablate: residual_ts\[lambda=-1\]: .*inverse_temperature: -1.0"),
        (["lambda=nan"], "ablate.*nan, Input should be a finite number"),
        (["gamma=-1"], r"ablate: residual_ts\[gamma=-1\]: spectral: gamma=-1"),
        (
            ["expansion_k=2"],
            "ablate: expansion_k, but none of the methods sample, residual_ts has it",
        ),
        (["alpha=0.5"], "ablate: alpha, but none"),
    ],
)
def test_what_cannot_be_swept_ends_with_one_message_before_anything_runs(
    ablate, message, tmp_path, monkeypatch, capsys
):
    with pytest.raises(ConfigurationError, match=message):
        load_config(
            None,
            SETTINGS | {"methods": ["sample", "residual_ts"], "ablate": parse_ablations(ablate)},
        )
    items = [part for item in ablate for part in ("--ablate", item)]
    command = [
        "sdt",
        "evaluate",
        "--methods",
        "sample,residual_ts",
        *items,
        "--output",
        str(tmp_path / "none"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as done:
        main()
    err = capsys.readouterr().err
    assert done.value.code == 2 and err.startswith("sdt: ") and err.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "nonneg", "ablate": {"gamma": [1, 2]}}, "gamma.*'nonneg' has no spectral term"),
        ({"ablate": {"rollouts": []}}, r"rollouts=\[\], allowed: one or more"),
        ({"ablate": {"rollouts": ["5"]}}, "ablate.rollouts.*'5'"),
        ({"ablate": {"rollouts": [True]}}, "ablate.rollouts.*True"),
        (
            {"ablate": {"rollouts": [1]}, "searchers_per_problem": 2, "methods": ["residual_ts"]},
            "num_rollouts = 1",
        ),
        (
            {
                "methods": [{"name": "dts", "options": {"branch_depths": [4]}}],
                "ablate": {"block_size": [2]},
            },
            r"dts\[block_size=2\].*give block_size or branch_depths",
        ),
        ({"methods": [{"name": "snis", "reward": "regex:a"}]}, "'regex:a' scores text"),
        ({"methods": [{"name": "snis", "reward": "specral"}]}, "Did you mean 'spectral'"),
    ],
)
def test_configurations_that_cannot_be_swept_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve(load_config(None, SWEPT | settings))


def test_what_was_expanded_is_the_same_again_and_changes_to_it_are_refused(swept):
    saved = yaml.safe_load((swept / "config.yaml").read_text())
    again = load_config(str(swept / "config.yaml"), {})
    assert (
        saved["ablate"] == {"rollouts": [4, 8], "lambda": [1.0, 3.0]} and len(saved["methods"]) == 5
    )
    assert expanded(again) == again == load_config(None, SWEPT)
    assert list(middle(again)) == ["sample", "residual_ts[rollouts=8,lambda=3]"]
    for change in (
        {"horizon": 16},
        {"ablate": {"rollouts": [4, 8]}},
        {"ablate": {"rollouts": [4], "lambda": [1, 3]}},
        {"ablate": {}},
    ):
        with pytest.raises(ConfigurationError, match=r"is not what ablate.* makes of it"):
            resolve(load_config(str(swept / "config.yaml"), change))
    with pytest.raises(ConfigurationError, match="residual_ts is not what ablate"):
        resolve(EvaluationConfig.model_validate(SWEPT))


def test_a_point_is_bit_for_bit_the_run_that_it_stands_for(swept, tmp_path, evaluate):
    """So its budget is matched too: the same nfe as any method with that num_rollouts."""
    lines = _lines(swept)
    for rollouts, strength in ((4, 1.0), (8, 3.0)):
        settings = {
            "methods": ["residual_ts"],
            "num_rollouts": rollouts,
            "inverse_temperature": strength,
        }
        plain = evaluate(tmp_path / f"{rollouts}", SETTINGS | settings)
        label = f"residual_ts[rollouts={rollouts},lambda={strength:g}]"
        assert _of(lines, label) == _of(plain, "residual_ts") != []
    assert _of(lines, "residual_ts[rollouts=8,lambda=1]") != _of(
        lines, "residual_ts[rollouts=8,lambda=3]"
    )


def test_budgets_are_matched_within_a_wave_at_every_point(swept):
    config = load_config(None, SWEPT)
    wave = SETTINGS["wave_size"] * SETTINGS["horizon"]
    for method in config.method_configs():
        if method.ablated:
            bound = matched_budget(config, method.ablated["rollouts"])["max_nfe"]
            assert bound <= method.ablated["rollouts"] * config.horizon
            costs = [line["nfe"] for line in _of(_lines(swept), method.label)]
            assert all(bound / 2 < nfe < bound + wave for nfe in costs)
    assert make_plan(config).nfe() == 2 * (2 * (30 + 61) + 6 * 8)


def test_an_ablation_is_resumed_and_no_other_goes_on_with_it(swept, tmp_path, evaluate):
    output = tmp_path / "run"
    output.mkdir()
    for name in ("config.yaml", "problems.json"):
        (output / name).write_bytes((swept / name).read_bytes())
    whole = (swept / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (output / "samples.jsonl").write_bytes(b"".join(whole[:5]))
    again = evaluate(output, SWEPT, resume=True)
    assert {pair: {**line, "wall_s": 0} for pair, line in again.items()} == {
        pair: {**line, "wall_s": 0} for pair, line in _lines(swept).items()
    }
    with pytest.raises(ResultsError, match="another configuration"):
        evaluate(output, SWEPT | {"ablate": {"rollouts": [4, 8]}}, resume=True)


def test_gamma_weighs_the_reward_that_is_searched_and_reported(tmp_path, evaluate):
    settings = SETTINGS | {"reward": "spectral+nonneg", "methods": ["sample", "best_of_n", "snis"]}
    lines = evaluate(tmp_path / "swept", settings | {"ablate": {"gamma": [0.5, 8]}})
    for line in lines.values():
        gamma = {"0.5": 0.5, "8": 8.0}.get(line["label"].partition("=")[2].rstrip("]"), 1.0)
        want = [gamma * terms["spectral"] + terms["bounds"] for terms in line["components"]]
        np.testing.assert_allclose(line["rewards"], want, rtol=1e-12)
    plain = evaluate(tmp_path / "plain", settings | {"reward": "spectral:gamma=8+nonneg"})
    assert _of(lines, "snis[gamma=8]") == _of(plain, "snis") != _of(lines, "snis[gamma=0.5]")
    saved = yaml.safe_load((tmp_path / "swept" / "config.yaml").read_text())
    assert [m["reward"] for m in saved["methods"][1:3]] == [
        "spectral:gamma=0.5+nonneg",
        "spectral:gamma=8+nonneg",
    ]


def test_a_dry_run_prints_the_points_and_their_cost(tmp_path, monkeypatch, capsys):
    command = [
        "evaluate",
        "--num-problems",
        2,
        "--horizon",
        8,
        "--methods",
        "greedy,snis",
        "--ablate",
        "rollouts=10,100",
    ]
    monkeypatch.setattr(
        sys, "argv", ["sdt", *map(str, command), "--dry-run", "--output", str(tmp_path / "run")]
    )
    with pytest.raises(SystemExit) as done:
        main()
    out = capsys.readouterr().out
    assert done.value.code == 0 and not (tmp_path / "run").exists()
    # 2 (8 + 76 + 760)
    assert "plan: 2 problems x 3 methods, at most 1,688 next-token distributions" in out
    assert yaml.safe_load(out.partition("plan:")[0])["ablate"] == {"rollouts": [10, 100]}
