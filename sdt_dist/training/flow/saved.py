"""Trajectories from output directories of `sdt evaluate`: the trees they keep, and the walks of runs that kept evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import CheckpointError, ConfigurationError, ResultsError
from sdt_dist.evaluation.evidence import EVIDENCE, evidence_keys, load_evidence, model_identity
from sdt_dist.evaluation.results import read_problems, saved_config, tree_path
from sdt_dist.models.process import ModelProcess
from sdt_dist.protocols import Root
from sdt_dist.rewards.context import RewardContext
from sdt_dist.rewards.spec import parse_reward
from sdt_dist.training.flow.extract import trajectories_of, with_rows
from sdt_dist.training.flow.trajectories import Candidates, Trajectory
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.values.records import WalkRecord, reward_of

_TOLERANCE = (
    0.05  # nats: rows of one model on other hardware differ by far less, other weights by far more
)


def check_saved(directories: Sequence[Path], model: str, reward: str) -> int:
    """The horizon of the runs in these directories; ResultsError unless each has searches of this model and reward."""
    horizons = {}
    for directory in directories:
        if not directory.is_dir():
            raise ResultsError(
                f"trees: {directory} does not exist; give an output directory of `sdt evaluate`."
            )
        config = saved_config(directory)
        if not _tree_files(directory) and not _has_evidence(directory):
            raise ResultsError(
                f"trees: {directory} holds no trees/*.npz of its reward; give a run with a tree method."
            )
        if config.model != model and model_identity(config.model) != model_identity(model):
            raise ResultsError(
                f"trees: {directory} has searches of model {config.model!r}, not of {model!r}."
            )
        if config.reward != reward:
            raise ResultsError(
                f"trees: {directory} has searches for reward {config.reward!r}, not for {reward!r}."
            )
        horizons[config.horizon] = directory
    if len(horizons) > 1:
        (one, first), (two, second) = list(horizons.items())[:2]
        raise ResultsError(
            f"trees: {first} has horizon {one}, {second} has {two}; train on runs of one horizon."
        )
    return next(iter(horizons))


def saved_trajectories(
    directories: Sequence[Path],
    process: ModelProcess,
    num_children: int | None,
    seed: int,
    *,
    ordered: bool = False,
) -> Iterator[list[Trajectory]]:
    """Trajectories of every kept search, a context at a time, with rows of p.

    Trees of token blocks are left out. ConfigurationError where nothing is left, CheckpointError for trees that another
    model's weights made.
    """
    count = 0
    for directory in directories:
        problems = {problem.index: problem for problem in read_problems(directory)}
        for problem, plain in [
            *_from_trees(directory, problems, process),
            *_from_evidence(directory, problems, process),
        ]:
            root = process.root(problem.context)
            found = with_rows(process, root, plain, num_children, seed, ordered=ordered)
            process.release(root)
            _check_rows(plain, found, directory)
            count += len(found)
            yield found
    if not count:
        raise ConfigurationError(
            "trees: none of the trees holds a finished sequence of tokens; search without blocks."
        )


Part = tuple[ForecastProblem, list[Trajectory]]


def _from_trees(
    directory: Path, problems: dict[int, ForecastProblem], process: ModelProcess
) -> Iterator[Part]:
    for path in _tree_files(directory):
        snapshot = Snapshot.load(path)
        problem = problems.get(snapshot.header["problem"])
        if problem is None:
            raise CheckpointError(
                f"trees: {path} is of problem {snapshot.header['problem']}, which its run does not have."
            )
        if not snapshot.blocks:
            yield problem, trajectories_of(snapshot, process.root(problem.context))


def _from_evidence(
    directory: Path, problems: dict[int, ForecastProblem], process: ModelProcess
) -> Iterator[Part]:
    """The walks that a run with keep_evidence kept of every problem, with the soft values that they amount to."""
    if not _has_evidence(directory):
        return
    config = saved_config(directory)
    store = load_evidence(directory)
    factory = parse_reward(config.reward)
    for index, key in evidence_keys(config, problems.values()).items():
        walks = {walk.sequence: walk for walk in store.walks(key)}
        if not walks:
            continue
        root = process.root(problems[index].context)
        multipliers = factory.build(RewardContext.of(problems[index].context)).multipliers
        prefixes = list(dict.fromkeys(s[:t] for s in walks for t in range(len(s) + 1)))
        values = store.soft_values(key, prefixes, config.inverse_temperature, multipliers)
        known = dict(zip(prefixes, np.where(np.isfinite(values), values, np.nan), strict=True))
        facts = {
            "soft_values_at": config.inverse_temperature,
            "source": {"method": "evidence", "problem": index},
        }
        yield (
            problems[index],
            [
                _of_walk(root, walk, reward_of(walk.components, multipliers), known, facts)
                for walk in walks.values()
            ],
        )


def _of_walk(
    root: Root,
    walk: WalkRecord,
    reward: float,
    known: dict[tuple[int, ...], float],
    facts: dict[str, Any],
) -> Trajectory:
    steps = [
        (np.array([token]), np.array([log_prob]), np.array([0.0]), np.array([np.nan]))
        for token, log_prob in zip(walk.tokens, walk.log_prob, strict=True)
    ]
    return Trajectory(
        root.digest.hex(),
        np.array(root.prompt, dtype=np.int32),
        walk.tokens,
        walk.log_prob,
        Candidates.join(steps),
        reward,
        walk.log_omega,
        np.array([known[walk.sequence[:t]] for t in range(len(walk.tokens) + 1)]),
        **facts,
    )


def _check_rows(plain: Sequence[Trajectory], found: Sequence[Trajectory], directory: Path) -> None:
    """CheckpointError where p of the trajectories' own tokens is not the model's."""
    for before, after in zip(plain, found, strict=True):
        for t, token in enumerate(after.tokens.tolist()):
            step = after.candidates.step(t)
            log_prob = after.candidates.log_prob[step][after.candidates.tokens[step] == token][0]
            if abs(log_prob - before.log_prob[t]) > _TOLERANCE:
                raise CheckpointError(
                    f"trees: {directory} was searched with other weights of the model: log p of a token is "
                    f"{before.log_prob[t]:.4g} there and {log_prob:.4g} now; search again, or give that model."
                )


def _tree_files(directory: Path) -> list[Path]:
    """The saved trees of a run, without those of methods that searched for another reward than the run's own."""
    config = saved_config(directory)
    others = {
        tree_path(directory, m.label)
        for m in config.method_configs()
        if config.reward_of(m) != config.reward
    }
    return sorted(path for path in (directory / "trees").glob("*.npz") if path not in others)


def _has_evidence(directory: Path) -> bool:
    return any((directory / EVIDENCE).glob("*.npz"))
