"""Trajectories for the flow's training: finished samples with the sibling candidates of every step.

See docs/concepts/flow.md.

Records, and how many of them become named arrays and files (.npz without pickled objects). They do not depend on the
inverse temperature: rewards are raw, and candidates carry what they stand for under p alone.
This module must not know torch, models or searches.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import CheckpointError, DataError
from sdt_dist.files import replace_file

FORMAT = "sdt-trajectories/1"
_CANDIDATE_DTYPES = {
    "tokens": np.int32,
    "log_prob": np.float64,
    "log_weight": np.float64,
    "reward": np.float64,
}


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The children considered at each of n steps, flat: those of step t are [ends[t-1], ends[t]) of all S.

    tokens [S]; log_prob [S]: log p(b|s_t); log_weight [S]: log w_b, what a candidate stands for under p, so that
    sum_b w_b f(b) estimates E_p f (complete rows: w = p); reward [S]: r of a finished child, NaN where it is not finished
    or not known; ends [n].
    """

    tokens: np.ndarray
    log_prob: np.ndarray
    log_weight: np.ndarray
    reward: np.ndarray
    ends: np.ndarray

    @classmethod
    def join(
        cls, steps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    ) -> Candidates:
        """Candidates from each step's (tokens, log_prob, log_weight, reward) [K_t]."""
        columns = zip(*steps, strict=True)
        named = zip(_CANDIDATE_DTYPES.items(), columns, strict=True)
        flat = {name: np.concatenate(column).astype(dtype) for (name, dtype), column in named}
        return cls(**flat, ends=np.cumsum([len(step[0]) for step in steps]))

    def step(self, t: int) -> slice:
        """Where the candidates of step t are."""
        return slice(int(self.ends[t - 1]) if t else 0, int(self.ends[t]))


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One finished sample as training sees it.

    context: hex digest of the prompt; prompt [L] and tokens [n] int32, an end token included; log_prob [n]: log p of
    each token; reward: raw r(x). log_omega: log p/q of the walk that found it, where known. soft_values [n + 1]: exact
    V of its states at `soft_values_at` (an inverse temperature), for calibration only, where known. source: where it
    comes from (method, seed, problem; plain JSON values).
    """

    context: str
    prompt: np.ndarray
    tokens: np.ndarray
    log_prob: np.ndarray
    candidates: Candidates
    reward: float
    log_omega: float | None = None
    soft_values: np.ndarray | None = None
    soft_values_at: float | None = None
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if not count or len(self.log_prob) != count or len(self.candidates.ends) != count:
            raise DataError(
                f"trajectory: {count} tokens, {len(self.log_prob)} log-probabilities and candidates of "
                f"{len(self.candidates.ends)} steps, must be as many of each and at least one."
            )
        if not np.isfinite(self.reward):
            raise DataError(f"trajectory: reward {self.reward}, allowed: finite numbers.")
        for t, token in enumerate(self.tokens.tolist()):
            if token not in self.candidates.tokens[self.candidates.step(t)]:
                raise DataError(
                    f"trajectory: token {token} of step {t} is none of that step's candidates; add it."
                )

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What makes two trajectories the same one."""
        return self.context, tuple(self.tokens.tolist())


def horvitz_thompson_log_weights(log_prob: np.ndarray, log_threshold: float) -> np.ndarray:
    """log w [K] of the candidates whose log p + Gumbel noise exceeds kappa, the largest of those left out.

    w_b = p_b / (1 - exp(-exp(log p_b - kappa))): then sum_b w_b f(b) has expectation sum_b p_b f(b) (Kool et al. 2019,
    arXiv 1903.06059, section 4.2). log_threshold: kappa, -inf where nothing was left out (then w = p).
    """
    with np.errstate(over="ignore"):
        inclusion = -np.expm1(-np.exp(log_prob - log_threshold))
    return log_prob - np.log(inclusion)


def pack_trajectories(
    trajectories: Sequence[Trajectory],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """(JSON-able header per trajectory, flat arrays by name)."""
    heads = [
        {
            "context": t.context,
            "reward": t.reward,
            "log_omega": t.log_omega,
            "soft_values_at": t.soft_values_at,
            "source": t.source,
            "sizes": [len(t.prompt), len(t.tokens), len(t.candidates.tokens)],
        }
        for t in trajectories
    ]
    unknown = [
        np.full(len(t.tokens) + 1, np.nan) if t.soft_values is None else t.soft_values
        for t in trajectories
    ]
    arrays = {
        "prompt": _flat([t.prompt for t in trajectories], np.int32),
        "tokens": _flat([t.tokens for t in trajectories], np.int32),
        "log_prob": _flat([t.log_prob for t in trajectories], np.float64),
        "soft_values": _flat(unknown, np.float64),
        "candidates/ends": _flat([t.candidates.ends for t in trajectories], np.int64),
    }
    for name, dtype in _CANDIDATE_DTYPES.items():
        arrays[f"candidates/{name}"] = _flat(
            [getattr(t.candidates, name) for t in trajectories], dtype
        )
    return heads, arrays


def unpack_trajectories(
    heads: Sequence[dict[str, Any]], arrays: dict[str, np.ndarray]
) -> list[Trajectory]:
    """What `pack_trajectories` packed."""
    begin = np.zeros(4, dtype=np.int64)  # in prompts, tokens, candidates, soft values
    found = []
    for head in heads:
        prompts, tokens, candidates = head["sizes"]
        end = begin + np.array([prompts, tokens, candidates, tokens + 1])
        of_prompt, of_tokens, of_candidates, of_values = (
            slice(a, b) for a, b in zip(begin, end, strict=True)
        )
        names = _CANDIDATE_DTYPES
        known = head["soft_values_at"] is not None
        found.append(
            Trajectory(
                head["context"],
                arrays["prompt"][of_prompt],
                arrays["tokens"][of_tokens],
                arrays["log_prob"][of_tokens],
                Candidates(
                    **{name: arrays[f"candidates/{name}"][of_candidates] for name in names},
                    ends=arrays["candidates/ends"][of_tokens],
                ),
                head["reward"],
                head["log_omega"],
                arrays["soft_values"][of_values] if known else None,
                head["soft_values_at"],
                head["source"],
            )
        )
        begin = end
    return found


def save_trajectories(path: Path, trajectories: Sequence[Trajectory]) -> None:
    """Write an .npz, whole or not at all; ResultsError when the disk refuses."""
    heads, arrays = pack_trajectories(trajectories)
    head = np.array(json.dumps({"format": FORMAT, "trajectories": heads}))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            np.savez_compressed(handle, head=head, **arrays)  # type: ignore[arg-type]

    replace_file(path, write)


def load_trajectories(path: Path) -> list[Trajectory]:
    """What `save_trajectories` wrote. CheckpointError for a missing, damaged or foreign file; pickles are refused."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = dict(file)
        head = json.loads(str(arrays.pop("head")))
        if head.get("format") != FORMAT:
            raise ValueError(f"format {head.get('format')!r}, allowed {FORMAT!r}")
        return unpack_trajectories(head["trajectories"], arrays)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise CheckpointError(
            f"trajectories: {path} holds none ({error}); give a file that save_trajectories wrote."
        ) from error


def _flat(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
