"""The flow's learner: exact resuming wherever it is killed, whole versions, bounded staleness, and what it refuses."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdt_dist.errors import CheckpointError, ConfigurationError, DataError, ResultsError
from sdt_dist.flow.checkpoint import INFO_FILE, WEIGHTS_FILE, FlowInfo, load_flow
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import Sample
from sdt_dist.search.session import SearchProblem
from sdt_dist.training.flow.collect import collect, trajectories_of_samples
from sdt_dist.training.flow.contexts import DatasetContexts, PromptContexts, SyntheticContexts
from sdt_dist.training.flow.extract import trajectories_of, with_rows
from sdt_dist.training.flow.learner import LOSSES_FILE, STATE_FILE, TENSORBOARD, Learner
from sdt_dist.training.flow.loss_log import read_losses
from sdt_dist.training.flow.options import FlowTrainOptions, LearnerOptions
from sdt_dist.training.flow.trajectories import Trajectory
from sdt_dist.training.flow.versions import latest_version
from tests.flow_helpers import toy_trajectory
from tests.search_helpers import PARAMETERS, run_toy, toy

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = FlowSpec(5, (0, 5), 4, values=(-1.0, 1.0), context_length=3, hidden_size=8, key_size=4)
INFO = FlowInfo("model", "toy", (1.0, 1.0))
TRAINING = FlowTrainOptions.parse(
    {
        "steps": 12,
        "lowest_inverse_temperature": 2,
        "highest_inverse_temperature": 5,
        "log_every": 2,
        "num_contexts": 3,
    }
)
OPTIONS = LearnerOptions(
    save_every=3, calibrate_every=4, keep_versions=2, max_staleness=1, replay_capacity=30
)
PART = 4  # steps between two versions


def sequences(first: int, prompt: int = 0) -> list[Trajectory]:
    return [
        toy_trajectory(toy("A"), toy("A").sequence(i), (prompt,)) for i in range(first, 600, 90)
    ]


def opened(directory: Path, *, resume: bool = False, **changes: Any) -> Learner:
    arguments: dict[str, Any] = {
        "spec": SPEC,
        "info": INFO,
        "training": TRAINING,
        "options": OPTIONS,
    } | changes
    return Learner.open(directory, **arguments, resume=resume)


def go_on(learner: Learner) -> Learner:
    """To the end from wherever it is: three versions, each after 4 steps on new trajectories of the last version."""
    while learner.version < 3:
        if len(learner.progress.rounds) == learner.version:
            learner.add(sequences(learner.version), None)
            learner.add(sequences(learner.version + 7, 1), learner.version)
            learner.progress.rounds.append([])
            learner.save()
        learner.train(PART * (learner.version + 1) - learner.step)
        learner.publish()
    learner.close()
    return learner


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody stopped."""
    directory = tmp_path_factory.mktemp("learner") / "whole"
    go_on(opened(directory))
    return directory


def same_training(one: Path, other: Path) -> bool:
    heads = [
        json.loads(
            (latest_version(path) or pytest.fail("no version"))[1].joinpath(INFO_FILE).read_text()
        )
        for path in (one, other)
    ]
    return (one / LOSSES_FILE).read_bytes() == (other / LOSSES_FILE).read_bytes() and heads[
        0
    ] == heads[1]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def test_a_learner_killed_before_a_write_goes_on_exactly(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every third file or directory that is put in place: the last version is whole, and the rest repeats to the bit."""
    from sdt_dist.flow import checkpoint
    from sdt_dist.training import state

    renames = Path.rename
    writes = checkpoint.replace_file
    moments = []
    for moment in range(0, 100, 3):
        left = iter([True] * moment)
        directory = tmp_path / str(moment)

        def count(left: Iterator[bool] = left) -> None:
            if not next(left, False):
                raise Killed

        with (
            monkeypatch.context() as patch,
            contextlib.suppress(Killed),
            contextlib.ExitStack() as stack,
        ):
            patch.setattr(
                Path, "rename", lambda path, target, count=count: (count(), renames(path, target))
            )
            for module in (checkpoint, state):
                patch.setattr(
                    module,
                    "replace_file",
                    lambda path, write, count=count: (count(), writes(path, write)),
                )
            learner = opened(directory)
            stack.callback(learner.close)
            go_on(learner)
            break
        moments.append(latest_version(directory))
        go_on(opened(directory, resume=True))
        assert same_training(directory, whole), moment
    numbers = [0 if latest is None else latest[0] for latest in moments]
    assert sorted(numbers) == numbers and set(numbers) >= {0, 1, 2} and len(moments) > 6


def test_losses_are_cut_back_to_the_saved_step(whole: Path, tmp_path: Path) -> None:
    learner = opened(tmp_path / "run")
    learner.add(sequences(0), None)
    learner.add(sequences(7, 1), 0)
    learner.progress.rounds.append([])
    learner.save()
    learner.train(3)
    learner.trainer.train_step()  # what a kill takes back
    learner.close()
    with (tmp_path / "run" / LOSSES_FILE).open("a") as handle:
        handle.write('{"step": 4, "loss/total": 9.0}\n{"step": 5, "lo')
    go_on(opened(tmp_path / "run", resume=True))
    assert same_training(tmp_path / "run", whole)
    assert [line["step"] for line in read_losses(whole / LOSSES_FILE)] == list(range(1, 13))


def test_versions_are_numbered_kept_and_whole(whole: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (whole / "versions").iterdir()) == ["000002", "000003"]
    number, path = latest_version(whole) or pytest.fail("no version")
    network, info, _ = load_flow(path)
    assert number == 3 and network.spec == SPEC
    assert info == replace(INFO, inverse_temperatures=(2.0, 5.0), version=3, metrics=info.metrics)
    assert info.metrics["loss/total"] == read_losses(whole / LOSSES_FILE)[-1]["loss/total"]
    go_on(opened(tmp_path / "run"))
    (tmp_path / "run" / "versions" / "000003" / WEIGHTS_FILE).write_bytes(b"damage")
    (tmp_path / "run" / "versions" / ".new-000004").mkdir()
    assert (latest_version(tmp_path / "run") or (0,))[0] == 2
    opened(tmp_path / "run", resume=True).close()
    assert (latest_version(tmp_path / "run") or (0,))[0] == 3  # written again from the state
    assert latest_version(tmp_path) is None


def test_staleness_is_bounded_and_counted(tmp_path: Path) -> None:
    learner = opened(tmp_path / "run")
    learner.add(sequences(0), None)
    learner.add(sequences(1), 0)
    learner.train(1)
    learner.publish()
    assert (len(learner.replay), learner.dropped, learner.expired) == (14, 0, 0)
    learner.publish()
    # draws from p alone stay
    assert (len(learner.replay), learner.dropped, learner.expired) == (
        7,
        0,
        7,
    )
    assert learner.add(sequences(2), 0) == 0 and learner.dropped == 7
    assert learner.add(sequences(2), 1) == 7 and len(learner.replay) == 14
    with pytest.raises(ConfigurationError, match="version 3, allowed: 0 to 2"):
        learner.add(sequences(3), 3)
    with pytest.raises(DataError, match="max_new_tokens"):
        learner.add([toy_trajectory(toy("C"), toy("C").sequence(0))], None)
    learner.save()
    learner.close()
    again = opened(tmp_path / "run", resume=True)
    assert (again.version, again.dropped, again.expired, len(again.replay)) == (2, 7, 7, 14)


def test_tensorboard_has_losses_calibration_and_staleness(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go_on(opened(tmp_path / "run"))
    go_on(opened(tmp_path / "run", resume=True))
    events = EventAccumulator(str(tmp_path / "run" / TENSORBOARD)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "loss/total",
        "loss/rtb",
        "log_z",
        "replay/size",
        "replay/dropped",
        "staleness/mean",
    } <= tags
    assert {"staleness/max", "throughput/steps_per_s", "throughput/trajectories_per_s"} <= tags
    lines = read_losses(tmp_path / "run" / LOSSES_FILE)
    for name in (
        "calibration/tree_rms_error",
        "calibration/tree_correlation",
        "calibration/tree_log_z_error",
    ):
        points = events.Scalars(name)
        assert [point.step for point in points] == [4, 8, 12]
        assert points[-1].value == pytest.approx(lines[-1][name])
    assert events.Scalars("staleness/max")[-1].value in (0.0, 1.0)


def test_calibration_compares_with_exact_values(tmp_path: Path) -> None:
    """The error of a flow that is a constant is the spread of the values."""
    import torch

    learner = opened(tmp_path / "run")
    trajectories = sequences(0)
    learner.add(trajectories, None)
    values = np.concatenate([t.soft_values for t in trajectories])  # type: ignore[misc]
    with torch.no_grad():
        for parameter in learner.trainer.network.state_head.parameters():
            parameter.zero_()
    learner.trainer.network.set_scale(float(values.mean()), 1.0)
    found = learner.calibrate()
    assert found["calibration/tree_rms_error"] == pytest.approx(values.std(), rel=1e-5)
    assert found["calibration/tree_log_z_error"] == pytest.approx(
        5 * abs(values.mean() - values[0]), rel=1e-4
    )


def test_foreign_damaged_and_other_directories_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    opened(run, configuration={"rounds": 3}).close()
    with pytest.raises(ResultsError, match="already holds a training; add --resume"):
        opened(run)
    with pytest.raises(ResultsError, match=r"another configuration \(rounds: 3, now 4\)"):
        opened(run, configuration={"rounds": 4}, resume=True)
    with pytest.raises(ResultsError, match=r"another configuration \(reward: 'toy', now 'else'\)"):
        opened(run, info=replace(INFO, reward="else"), resume=True)
    with pytest.raises(ResultsError, match=r"another configuration \(spec"):
        opened(run, spec=replace(SPEC, hidden_size=16), resume=True)
    with pytest.raises(
        ResultsError, match=r"another configuration \(learner: .*'keep_versions': 2"
    ):
        opened(run, options=OPTIONS.model_copy(update={"keep_versions": 9}), resume=True)
    with pytest.raises(CheckpointError, match=r"rtb=1\.0, now 2\.0"):
        opened(run, training=TRAINING.model_copy(update={"rtb": 2.0}), resume=True)
    (run / STATE_FILE).write_bytes((run / STATE_FILE).read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        opened(run, resume=True)
    (run / STATE_FILE).unlink()
    (run / "samples.jsonl").touch()
    with pytest.raises(
        CheckpointError, match=r"holds 'samples\.jsonl' but no training\.safetensors"
    ):
        opened(run, resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="no directory"):
        opened(tmp_path / "file")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / f"{STATE_FILE}.tmp").touch()  # killed before there was a state
    opened(tmp_path / "torn", resume=True).close()


def test_exhausted_trees_carry_exact_values() -> None:
    model = toy("A")
    result = run_toy("A", "residual_ts", 3, num_rollouts=700)
    root = TokenProcess(model, model.law, model.length).root([0])
    assert result.snapshot is not None
    for t in trajectories_of(result.snapshot, root):
        exact = [model.soft_values[i][model.index(t.key[1][:i])] for i in range(5)]
        assert t.soft_values_at == 5.0 and t.soft_values is not None
        np.testing.assert_allclose(t.soft_values, exact, atol=1e-9)


def test_trees_without_masses_carry_no_values() -> None:
    model = toy("A")
    result = run_toy("A", "dts", 3, num_rollouts=20)
    root = TokenProcess(model, model.law, model.length).root([0])
    assert result.snapshot is not None
    assert all(t.soft_values is None for t in trajectories_of(result.snapshot, root))


@pytest.mark.parametrize("num_children", [None, 6])
def test_samples_without_a_tree_give_the_same_trajectories(num_children: int | None) -> None:
    model = toy("D")
    result = run_toy("D", "residual_ts", 3, num_rollouts=20)
    process = TokenProcess(model, model.law, model.length)
    root = process.root([0])
    assert result.snapshot is not None
    want = with_rows(process, root, trajectories_of(result.snapshot, root), num_children, 5)
    have = trajectories_of_samples(process, root, result.finished, num_children, 5)
    for one, other in zip(want, have, strict=True):
        assert one.key == other.key and one.reward == other.reward
        np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-12)
        for name in ("tokens", "log_prob", "log_weight", "reward", "ends"):
            np.testing.assert_allclose(
                getattr(one.candidates, name), getattr(other.candidates, name), atol=1e-9
            )


def test_a_sample_gets_the_end_token_that_it_came_with() -> None:
    model = toy("A")
    process = TokenProcess(model, replace(model.law, end_tokens=(3, 4)), model.length)
    root = process.root([0])
    log_probs = [model.log_prob_tables[0][0][1], model.log_prob_tables[1][1][4]]
    sample = Sample((1,), 0.5, float(sum(log_probs)), "eos")
    (found,) = trajectories_of_samples(process, root, [sample])
    assert found.key[1] == (1, 4) and found.reward == 0.5
    np.testing.assert_allclose(found.log_prob, log_probs)


@pytest.mark.parametrize("method", ["snis", "residual_ts", "best_of_n"])
def test_searches_become_trajectories(method: str) -> None:
    model = Toy(*PARAMETERS["A"])
    process = TokenProcess(model, model.law, model.length)
    problems = [SearchProblem(i, process.root([i]), model) for i in (0, 0, 0)]
    problems = [replace(p, index=i) for i, p in enumerate(problems)]
    found = collect(
        process, problems, method, {"num_rollouts": 6, "inverse_temperature": 5.0}, seed=1
    )
    assert len(found.rewards) == 3 and not found.errors and found.brought("snis").searches == 3
    assert {t.source["problem"] for t in found.trajectories} == {0, 1, 2}
    for t in found.trajectories:
        assert t.reward == model.rewards[model.index(t.key[1])]
        assert (np.diff(t.candidates.ends, prepend=0) == 5).all() and t.source["method"] == method


def test_contexts_of_a_round_depend_on_seed_and_round_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo \nthree\none\n")
    sources = [
        SyntheticContexts(64),
        DatasetContexts("classic", 64),
        PromptContexts(tmp_path / "prompts.txt"),
    ]
    for source in sources:
        first, again, other = (source.draw(3, number, 2) for number in (0, 0, 1))
        assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, other))
        assert source.description
    assert sorted(sources[2].draw(0, 0, 9)) == ["one", "three", "two"]  # type: ignore[type-var]


def test_datasets_are_used_before_the_cut_off_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("load\n" + "\n".join(map(str, range(200))))
    whole = DatasetContexts(str(path), 50)
    cut = DatasetContexts(str(path), 50, end_row=100)
    ends = [float(np.max(c)) for c in whole.draw(0, 0, 300)]  # type: ignore[arg-type]
    assert max(ends) == 149.0 and min(ends) == 49.0
    assert max(float(np.max(c)) for c in cut.draw(0, 0, 300)) == 99.0  # type: ignore[arg-type]
    with pytest.raises(DataError, match="before row 3"):
        DatasetContexts(str(path), 50, end_row=3)
