"""The forecaster: tokens and scales, checkpoints, exact training, and searches that ignore their companions.

See docs/architecture/search.md, docs/guides/backends.md#bundled-forecaster.
"""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdt_dist.data import load_problems, synthetic
from sdt_dist.data.scale import MIN_HISTORY, Scale
from sdt_dist.errors import (
    CheckpointError,
    ConfigurationError,
    ContextError,
    DataError,
    ResultsError,
)
from sdt_dist.models.forecaster import bundled
from sdt_dist.models.forecaster.bundled import WEIGHTS_FILE, load_module
from sdt_dist.models.forecaster.spec import BUNDLED, FORMAT, SPEC_FILE, ForecasterSpec
from sdt_dist.models.forecaster.tokenizer import FIRST_BIN, ValueTokenizer
from sdt_dist.models.loading import load_model
from sdt_dist.protocols import RolloutRequest
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import parse_reward
from sdt_dist.search.api import run_searches
from sdt_dist.search.session import SearchProblem
from sdt_dist.training.forecaster import batches, train, trainer
from sdt_dist.training.forecaster.batches import CsvSource, SyntheticSource, token_batch
from sdt_dist.training.forecaster.train import CURVE_FILE, train_forecaster
from sdt_dist.training.forecaster.trainer import CHECKPOINT_FILE, TrainConfig

TOKENIZER = ValueTokenizer()
CPU = torch.device("cpu")
SMALL = ForecasterSpec(
    context_length=64,
    max_horizon=16,
    vocab_size=66,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    head_dim=16,
)
HISTORIES = arrays(
    np.float64, st.integers(MIN_HISTORY, 60), elements=st.floats(-1e3, 1e3, width=32)
).filter(lambda x: x.std() > 1e-3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def forecaster():
    return load_model("bundled")


def _wave(rows: int) -> np.ndarray:
    return 10 + np.sin(np.arange(rows) / 4) + 0.1 * np.random.default_rng(0).standard_normal(rows)


@given(
    arrays(np.float64, 20, elements=st.floats(-10, 10)), st.floats(-1e6, 1e6), st.floats(1e-3, 1e6)
)
def test_values_within_the_limit_come_back_within_half_a_bin(values, loc, scale):
    back = TOKENIZER.decode(TOKENIZER.tokens(values), Scale(loc, scale))
    slack = 1e-9 * (abs(loc) + scale)
    assert (np.abs(back - (loc + scale * values)) <= scale * TOKENIZER.bin_width / 2 + slack).all()


@given(st.floats(10, 1e300))
def test_values_beyond_the_limit_take_the_outermost_bin(value):
    assert TOKENIZER.tokens(np.array([-value, value])).tolist() == [
        FIRST_BIN,
        TOKENIZER.vocab_size - 1,
    ]


@given(HISTORIES, st.integers(-8, 8), st.integers(-1000, 1000))
def test_an_affine_map_of_a_history_maps_its_decoding_and_keeps_its_tokens(history, power, shift):
    """Values that lie on a bin's edge may round either way, so tokens agree to one bin, decoded ones to one width."""
    factor = 2.0**power
    tokens, scale = TOKENIZER.encode(history)
    mapped, other = TOKENIZER.encode(factor * history + shift)
    assert other.scale == pytest.approx(factor * scale.scale, rel=1e-6)
    assert other.loc == pytest.approx(factor * scale.loc + shift, rel=1e-6, abs=1e-6 * other.scale)
    z = (history - scale.loc) / scale.scale / TOKENIZER.bin_width
    inside = np.abs(z - 0.5 - np.rint(z - 0.5)) > 1e-3
    assert (np.abs(mapped - tokens) <= 1).all() and (mapped == tokens)[inside].all()
    same = np.arange(FIRST_BIN, TOKENIZER.vocab_size)
    np.testing.assert_allclose(
        TOKENIZER.decode(same, other),
        factor * TOKENIZER.decode(same, scale) + shift,
        rtol=1e-6,
        atol=1e-5 * other.scale,
    )


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (_wave(MIN_HISTORY - 1), ["(15,)", "at least 16"]),
        (np.ones((20, 2)), ["(20, 2)", "one dimension"]),
        (np.where(np.arange(32) == 4, np.nan, _wave(32)), ["nan", "position 4"]),
        (np.where(np.arange(32) == 9, -np.inf, _wave(32)), ["-inf", "position 9"]),
        (np.full(32, 1e6), ["constant"]),
    ],
)
def test_an_unusable_history_is_refused(forecaster, history, words):
    with pytest.raises(ContextError) as error:
        forecaster.process(8).root(history)
    assert all(word in str(error.value) for word in words)


def test_a_horizon_beyond_the_limit_is_refused(forecaster):
    longest = forecaster.spec.max_horizon
    assert forecaster.process(longest).max_new_tokens == longest
    for horizon in (0, longest + 1):
        with pytest.raises(ConfigurationError, match=f"horizon: {horizon}, allowed 1 to {longest}"):
            forecaster.process(horizon)


def test_only_the_last_context_length_values_count(forecaster):
    process = forecaster.process(8)
    length = forecaster.spec.context_length
    long = np.concatenate([np.full(100, 1e9), _wave(length)])
    whole = process.root(long)
    last = process.root(long[-length:])
    assert (whole.prompt, whole.digest, whole.meta) == (last.prompt, last.digest, last.meta)
    assert len(whole.prompt) == length and len(process.root(long[-40:]).prompt) == 40


@pytest.mark.parametrize("temperature", [1.0, 50.0])
def test_exactly_horizon_bin_tokens_are_generated(forecaster, temperature):
    """At temperature 50 the prior is nearly flat, so an unmasked PAD or EOS would be drawn about once in 512 tokens."""
    horizon = 24
    process = forecaster.process(horizon, sampling_temperature=temperature)
    root = process.root(_wave(64))
    replies = process.rollout([RolloutRequest(root, (), horizon, key) for key in range(128)])
    drawn = np.stack([reply.tokens for reply in replies])
    assert drawn.shape == (128, horizon)
    assert drawn.min() >= FIRST_BIN and drawn.max() < forecaster.spec.vocab_size
    assert {reply.finish_reason for reply in replies} == {"length"}
    (decoded,) = process.decode(root, [tuple(drawn[0].tolist())])
    assert decoded.series.shape == (horizon,) and np.isfinite(decoded.series).all()


def test_the_bundled_weights_load_small_and_finite():
    assert (BUNDLED / WEIGHTS_FILE).stat().st_size <= 10 * 2**20
    module, spec = load_module("bundled")
    assert spec == ForecasterSpec.load(BUNDLED)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def _config(directory: Path, **changes) -> TrainConfig:
    return replace(
        TrainConfig(str(directory), steps=6, batch_size=2, spec=SMALL, checkpoint_every=100),
        **changes,
    )


def _weights(directory: Path) -> dict[str, bytes]:
    return {
        name: value.numpy().tobytes() for name, value in load_file(directory / WEIGHTS_FILE).items()
    }


def _step(directory: Path) -> int:
    with safe_open(directory / CHECKPOINT_FILE, framework="pt") as file:
        return int(file.metadata()["step"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_forecaster(_config(tmp_path_factory.mktemp("trained")))


class _Stopped(Exception):
    """What stands for Ctrl-C or a crash between two steps."""


@pytest.mark.parametrize("stop_at", [1, 4])
def test_training_resumes_exactly(trained, tmp_path, stop_at):
    def stop(step: int, _: float) -> None:
        if step == stop_at + 1:
            raise _Stopped

    with pytest.raises(_Stopped):
        train_forecaster(_config(tmp_path, checkpoint_every=stop_at), on_step=stop)
    assert _step(tmp_path) == stop_at
    steps: list[int] = []
    train_forecaster(_config(tmp_path), on_step=lambda step, _: steps.append(step))
    assert steps == list(range(stop_at + 1, 7))
    assert _weights(tmp_path) == _weights(trained)


@pytest.mark.parametrize("renames", range(6))
def test_a_kill_between_any_two_files_of_a_save_resumes_exactly(
    trained, tmp_path, monkeypatch, renames
):
    """Saves after steps 2 and 4; the kill leaves a torn file beside the one that was to come."""
    real = Path.replace
    done = []

    def replace_until_killed(self: Path, target: Path) -> Path:
        if len(done) == renames:
            Path(f"{target}.tmp.torn").write_bytes(self.read_bytes()[:-9])
            raise _Stopped
        done.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_until_killed)
    with pytest.raises(_Stopped):
        train_forecaster(_config(tmp_path, checkpoint_every=2))
    monkeypatch.undo()
    for torn in tmp_path.glob("*.torn"):
        torn.replace(torn.with_suffix(""))
    steps: list[int] = []
    train_forecaster(_config(tmp_path), on_step=lambda step, _: steps.append(step))
    assert len(steps) == (6, 4, 4, 4, 2, 2)[renames]
    assert _weights(tmp_path) == _weights(trained) and load_module(str(tmp_path))[1] == SMALL
    curve = [json.loads(line)["step"] for line in (tmp_path / CURVE_FILE).read_text().splitlines()]
    assert curve == sorted(set(curve)) and not list(tmp_path.glob("*.tmp"))


def test_a_kill_between_checkpoint_and_forecaster_still_exports_the_last_step(trained, tmp_path):
    train_forecaster(_config(tmp_path))
    save_file(
        {k: torch.zeros_like(v) for k, v in load_file(tmp_path / WEIGHTS_FILE).items()},
        tmp_path / WEIGHTS_FILE,
    )
    assert _weights(train_forecaster(_config(tmp_path))) == _weights(trained)


def _rewrite(path: Path, change) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: torch.save({"step": 4}, path),
        lambda path: save_file({"weight": torch.zeros(2)}, path),
        lambda path: _rewrite(path, lambda tensors, metadata: metadata.update(step="four")),
        lambda path: _rewrite(path, lambda tensors, _: tensors.pop("model.model.norm.weight")),
        lambda path: _rewrite(
            path, lambda tensors, _: tensors["model.model.norm.weight"].fill_(np.nan)
        ),
        lambda path: _rewrite(path, lambda tensors, _: tensors.pop("optimiser.1.0.exp_avg")),
        lambda path: _rewrite(
            path, lambda tensors, _: tensors.update({"optimiser.0.x.y": torch.zeros(1)})
        ),
        lambda path: _rewrite(
            path, lambda tensors, _: tensors.update({"optimiser.0.0.y": torch.zeros(7)})
        ),
    ],
    ids=[
        "missing",
        "torn",
        "pickled",
        "foreign",
        "step",
        "weight",
        "nan",
        "moment",
        "name",
        "shape",
    ],
)
def test_a_damaged_training_checkpoint_is_refused(trained, tmp_path, damage):
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / CHECKPOINT_FILE)
    with pytest.raises(CheckpointError, match=CHECKPOINT_FILE):
        train_forecaster(_config(tmp_path))
    assert _weights(tmp_path) == _weights(trained)


def test_what_training_cannot_use_is_refused_before_a_network_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(ForecasterSpec, "build", lambda self: pytest.fail("a network was built"))
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 9)
    pd.DataFrame({"load": _wave(50)}).to_csv(tmp_path / "short.csv", index=False)
    (tmp_path / "file").write_text("kept")
    for error, changes in [
        (DataError, {"data": "absent.csv"}),
        (DataError, {"data": str(tmp_path / "binary.csv")}),
        (DataError, {"data": str(tmp_path / "short.csv")}),
        (ConfigurationError, {"device": "tpu"}),
        (ConfigurationError, {"device": "cuda:99"}),
        (ResultsError, {"output": str(tmp_path / "file")}),
    ]:
        with pytest.raises(error, match=str(next(iter(changes.values())))):
            train_forecaster(_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists() and (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ConfigurationError, match="adam_lr"):
        _config(tmp_path, adam_lr=float("nan"))


def test_a_time_limit_stops_resumably(trained, tmp_path):
    train_forecaster(_config(tmp_path), max_seconds=0)
    assert _step(tmp_path) == 1
    assert _weights(train_forecaster(_config(tmp_path))) == _weights(trained)


def test_the_seed_decides_the_weights(trained, tmp_path):
    assert _weights(train_forecaster(_config(tmp_path / "again"))) == _weights(trained)
    assert _weights(train_forecaster(_config(tmp_path / "other", seed=1))) != _weights(trained)


@pytest.mark.parametrize(
    "change", [{"steps": 7}, {"seed": 1}, {"batch_size": 3}, {"adam_lr": 1e-3}]
)
def test_another_configurations_directory_is_refused(trained, change):
    before = _weights(trained)
    with pytest.raises(CheckpointError, match="another configuration"):
        train_forecaster(_config(trained, **change))
    assert _weights(trained) == before


def test_fine_tuning_starts_from_its_init(trained, tmp_path):
    pd.DataFrame({"load": _wave(200)}).to_csv(tmp_path / "load.csv", index=False)
    config = _config(
        tmp_path / "own", init=str(trained), data=str(tmp_path / "load.csv"), end_row=150, steps=1
    )
    still = train_forecaster(
        replace(config, output=str(tmp_path / "still"), muon_lr=0.0, adam_lr=0.0)
    )
    assert _weights(still) == _weights(trained)
    assert _weights(train_forecaster(config)) != _weights(trained)
    with pytest.raises(ConfigurationError, match="init"):
        train_forecaster(
            replace(config, output=str(tmp_path / "wide"), spec=replace(SMALL, hidden_size=64))
        )


def test_fine_tuning_sees_rows_before_the_end_row_only(tmp_path):
    values = np.stack([_wave(300), -_wave(300)], axis=1)
    changed = values.copy()
    changed[100:] = 1e6 * np.random.default_rng(1).standard_normal((200, 2))
    sources = []
    for name, table in (("before", values), ("after", changed)):
        pd.DataFrame(table, columns=["a", "b"]).to_csv(tmp_path / f"{name}.csv", index=False)
        sources.append(CsvSource(tmp_path / f"{name}.csv", 100, CPU))
    for step in range(20):
        drawn = [
            token_batch(source, SMALL, 16, torch.Generator().manual_seed(step))
            for source in sources
        ]
        assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
    with pytest.raises(DataError, match="80 rows"):
        CsvSource(tmp_path / "before.csv", 80, CPU).draw(1, 80, torch.Generator())


def test_training_batches_hold_bin_tokens_and_score_no_leading_token():
    tokens, weights = token_batch(SyntheticSource(), SMALL, 32, torch.Generator().manual_seed(0))
    assert tokens.shape == (32, SMALL.max_length) and weights.shape == (32, SMALL.max_length - 1)
    assert tokens.min() >= FIRST_BIN and tokens.max() < SMALL.vocab_size
    assert not weights[:, :MIN_HISTORY].any() and weights[:, MIN_HISTORY:].any()


def test_synthetic_series_repeat_by_seed_and_are_finite():
    def draw(seed: int) -> torch.Tensor:
        return synthetic.generate(64, 200, torch.Generator().manual_seed(seed))

    first = draw(0)
    assert (
        first.shape == (64, 200) and torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    )
    for seed in range(8):
        series = draw(seed)
        assert torch.isfinite(series).all() and (series.std(1) > 0).all()


def _imports(module) -> set[str]:
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module
    }


def test_training_data_are_synthetic_and_no_dataset_is_within_reach():
    assert _imports(synthetic) == {"__future__", "math", "torch"}
    calls = {
        node.id
        for node in ast.walk(ast.parse(inspect.getsource(synthetic)))
        if isinstance(node, ast.Name)
    }
    assert not calls & {"open", "eval", "exec", "__import__"}
    harmless = {"sdt_dist.data.scale", "sdt_dist.data.synthetic"}
    for module in (batches, bundled, train, trainer):
        found = _imports(module) - harmless
        assert not [n for n in found if n.startswith(("sdt_dist.data", "statsmodels", "urllib"))]


def _checkpoint(directory: Path, **fields) -> Path:
    directory.mkdir()
    tensors = {
        name: value for name, value in SMALL.build().state_dict().items() if "lm_head" not in name
    }
    save_file(tensors, directory / WEIGHTS_FILE)
    SMALL.save(directory)
    saved = json.loads((directory / SPEC_FILE).read_text())
    (directory / SPEC_FILE).write_text(json.dumps(saved | fields))
    return directory


def test_a_checkpoint_is_refused_unless_it_is_whole_and_ours(tmp_path):
    assert load_module(str(_checkpoint(tmp_path / "good")))[1] == SMALL
    for name, fields in {
        "format": {"format": "other/1"},
        "field": {"dropout": 0.1},
        "shape": {"vocab_size": 68},
    }.items():
        with pytest.raises(CheckpointError):
            load_module(str(_checkpoint(tmp_path / name, **fields)))
    for name, text in {"text": "{", "list": "[]", "none": json.dumps({"vocab_size": 66})}.items():
        (_checkpoint(tmp_path / name) / SPEC_FILE).write_text(text)
        with pytest.raises(CheckpointError):
            load_module(str(tmp_path / name))
    with pytest.raises(CheckpointError, match=SPEC_FILE):
        load_module(str(tmp_path))
    assert json.loads((tmp_path / "good" / SPEC_FILE).read_text())["format"] == FORMAT


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": "x"}, {"vocab_size": 3}, {"vocab_size": 10**9}, {"head_dim": 0}, {"head_dim": 12}, {"num_layers": True},
        {"hidden_size": 32.0}, {"limit": 0}, {"limit": float("nan")}, {"limit": None}, {"context_length": 8},
    ],
)  # fmt: skip
def test_a_spec_of_no_network_is_refused_by_its_field(tmp_path, fields):
    ((name, _),) = fields.items()
    with pytest.raises(CheckpointError, match=name):
        load_module(str(_checkpoint(tmp_path / "bad", **fields)))


def test_a_spec_that_is_not_text_and_weights_that_are_not_finite_are_refused(tmp_path):
    (_checkpoint(tmp_path / "bytes") / SPEC_FILE).write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_module(str(tmp_path / "bytes"))
    path = _checkpoint(tmp_path / "nan") / WEIGHTS_FILE
    _rewrite(path, lambda tensors, _: tensors["model.norm.weight"][0].fill_(np.inf))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_model(str(tmp_path / "nan"))


def test_pickled_torn_and_missing_weights_are_refused(tmp_path):
    pickled, torn, missing = (
        _checkpoint(tmp_path / name) for name in ("pickled", "torn", "missing")
    )
    torch.save(SMALL.build().state_dict(), pickled / WEIGHTS_FILE)
    (torn / WEIGHTS_FILE).write_bytes((torn / WEIGHTS_FILE).read_bytes()[:-4])
    (missing / WEIGHTS_FILE).unlink()
    for directory in (pickled, torn, missing):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_model(str(directory))


def _told(samples) -> list[tuple]:
    return [(sample.tokens, sample.reward, sample.log_prob) for sample in samples]


def test_a_search_is_the_same_alone_and_beside_any_companions():
    """Each companion set starts with a fresh model, so that nothing is left in its caches."""
    problems = load_problems("classic", horizon=12, context_length=128)
    factory = parse_reward("spectral:gamma=1")
    options = {"num_rollouts": 12, "num_samples": 8, "wave_size": 4, "inverse_temperature": 3.0}

    def search(indices: list[int], in_flight: int) -> dict[int, tuple]:
        process = load_model("bundled").process(12)
        chosen = [
            SearchProblem(
                i, process.root(p.history), factory.build(RewardContext(history=p.history))
            )
            for i, p in ((i, problems[i]) for i in indices)
        ]
        runs = run_searches(
            process, chosen, method="residual_ts", options=options, seed=5, in_flight=in_flight
        )
        return {
            i: (_told(run.finished), _told(run.samples), run.log_z, run.nfe, run.rollouts)
            for i, run in runs
        }

    targets = list(range(16))
    rest = list(range(16, len(problems)))
    assert len(rest) >= 14 and len({problems[i].name for i in range(len(problems))}) == len(
        problems
    )
    alone = {index: search([index], 1)[index] for index in targets}
    assert all(len(finished) == rollouts == 12 for finished, *_, rollouts in alone.values())
    for companions, in_flight in ((rest[:7] + targets, 64), (targets[::-1] + rest[7:], 11)):
        together = search(companions, in_flight)
        for index in targets:
            assert together[index] == alone[index], problems[index].name
