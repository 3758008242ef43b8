"""Evidence of evaluation runs: its keys, what a run keeps under its directory, and what a warm start reads.

See docs/concepts/exactness.md#shared-evidence.

`evidence/` holds one file a problem and method label; each is put in place by a rename before its problem counts as
done. It must not know who searches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from sdt_dist.data.problems import ForecastProblem
from sdt_dist.errors import ConfigurationError
from sdt_dist.evaluation.config import EvaluationConfig
from sdt_dist.models.spec import outlook_of
from sdt_dist.rewards.spec import reward_identity
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.values.extract import walks_of
from sdt_dist.values.files import write_evidence
from sdt_dist.values.keys import evidence_key
from sdt_dist.values.store import EvidenceStore

EVIDENCE = "evidence"
_WEIGHTS = (".safetensors", ".json", ".txt", ".model")


def evidence_keys(
    config: EvaluationConfig, problems: Iterable[ForecastProblem], reward: str | None = None
) -> dict[int, str]:
    """The evidence key of each problem, by its index: the same in every run that searches the same thing.

    reward: a REWARD SPEC; default the evaluation's. lambda, the reward's multipliers, budgets, seeds and method settings are no part of it; the model's weights are.
    """
    model = model_identity(config.model)
    terms = reward_identity(config.reward if reward is None else reward)
    return {
        problem.index: evidence_key(
            model=model,
            tokenizer=model,
            law=None,
            max_new_tokens=config.horizon,
            reward=terms,
            context=np.asarray(problem.history, dtype=np.float64).tobytes(),
        )
        for problem in problems
    }


def model_identity(spec: str) -> str:
    """A MODEL SPEC that pins the weights: a digest of a directory's files; a hub id or an address as it is."""
    outlook = outlook_of(spec)
    directory = outlook.path
    if directory is None or not directory.is_dir():
        return f"{outlook.backend}:{outlook.name}"
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in directory.iterdir() if path.suffix in _WEIGHTS):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return f"{outlook.backend}:{digest.hexdigest()}"


def evidence_path(output: Path, label: str, problem: int) -> Path:
    """Where the evidence of a problem and a method label is kept."""
    return output / EVIDENCE / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', label)}-{problem}.npz"


def keep_evidence(
    output: Path, label: str, problem: int, key: str, snapshot: Snapshot, run: str
) -> None:
    """Keep the walks of a finished search. ResultsError when the disk refuses.

    run: a name that no other run has; the walks of a search on its own are named by it and the label.
    """
    write_evidence(
        evidence_path(output, label, problem), {key: (walks_of(snapshot, f"{run}/{label}"), {})}
    )


def load_evidence(directory: str | Path) -> EvidenceStore:
    """All evidence that a run kept in its output directory.

    ConfigurationError where there is none, CheckpointError for a damaged file.
    """
    store = EvidenceStore()
    files = evidence_files(directory)
    for path in files:
        store.restore(path)
    return store


def evidence_files(directory: str | Path) -> list[Path]:
    """The evidence files of a run's output directory; ConfigurationError where there are none."""
    files = sorted((Path(directory) / EVIDENCE).glob("*.npz"))
    if not files:
        raise ConfigurationError(
            f"warm_start: {directory} holds no {EVIDENCE}/*.npz; give the output directory of a run with keep_evidence."
        )
    return files


def check_warm(store: EvidenceStore, keys: Mapping[int, str], directory: str | Path) -> None:
    """ConfigurationError when no problem has evidence: another model, data, horizon or reward was searched there."""
    if not any(store.walks(key) for key in keys.values()):
        raise ConfigurationError(
            f"warm_start: {directory} holds evidence of none of these {len(keys)} problems; it must be of the same model, "
            "data, context length, horizon and reward terms (lambda and the terms' multipliers may differ)."
        )
