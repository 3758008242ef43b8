"""Evidence as plain arrays and a JSON header, and as an .npz file without pickled objects.

See docs/concepts/exactness.md#shared-evidence.

It must not know what the walks mean.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import CheckpointError
from sdt_dist.files import replace_file
from sdt_dist.values.records import Vector, WalkRecord

FORMAT = "sdt-evidence/1"
Arrays = dict[str, np.ndarray]
Evidence = dict[str, tuple[list[WalkRecord], Vector]]  # walks and closed streams by key
_NUMBERS = {
    "number": np.int64,
    "ticket": np.int64,
    "log_omega": np.float64,
    "noise": np.uint64,
    "nfe": np.int64,
}
_STEPS = {
    "tokens": np.int32,
    "log_prob": np.float64,
    "log_outside": np.float64,
    "support": np.int32,
}


def pack_walks(walks: Sequence[WalkRecord]) -> tuple[dict[str, Any], Arrays]:
    """A JSON header and plain arrays that hold walks [N] of one key; `unpack_walks` gives them back bit by bit."""
    vectors = {id(walk.known): walk.known for walk in walks}
    place = {name: i for i, name in enumerate(vectors)}
    streams = sorted({walk.stream for walk in walks}.union(*vectors.values()))
    index = {stream: i for i, stream in enumerate(streams)}
    terms = list(walks[0].components) if walks else []
    pairs = [(i, index[s], n) for i, known in enumerate(vectors.values()) for s, n in known.items()]
    arrays: Arrays = {
        "stream": np.array([index[walk.stream] for walk in walks], dtype=np.int32),
        "vector": np.array([place[id(walk.known)] for walk in walks], dtype=np.int32),
        "vectors": np.array(pairs, dtype=np.int64).reshape(-1, 3),
        "length": np.array([len(walk.tokens) for walk in walks], dtype=np.int64),
        "terms": np.array([[w.components[t] for t in terms] for w in walks], np.float64).reshape(
            len(walks), len(terms)
        ),
    }
    arrays |= {
        name: np.array([getattr(w, name) for w in walks], dtype=kind)
        for name, kind in _NUMBERS.items()
    }
    arrays |= {
        name: _joined([getattr(w, name) for w in walks], kind) for name, kind in _STEPS.items()
    }
    return {"streams": streams, "terms": terms, "num_vectors": len(vectors)}, arrays


def unpack_walks(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[WalkRecord]:
    """What `pack_walks` packed; walks that shared a vector share it again. KeyError or ValueError for other arrays."""
    streams = header["streams"]
    terms = header["terms"]
    vectors: list[dict[str, int]] = [{} for _ in range(header["num_vectors"])]
    for vector, stream, count in arrays["vectors"].tolist():
        vectors[vector][streams[stream]] = count
    cuts = np.cumsum(arrays["length"])[:-1]
    columns: dict[str, list[Any]] = {name: arrays[name].tolist() for name in _NUMBERS}
    columns |= {name: np.split(arrays[name], cuts) for name in _STEPS}
    columns["stream"] = [streams[i] for i in arrays["stream"].tolist()]
    columns["known"] = [vectors[i] for i in arrays["vector"].tolist()]
    columns["components"] = [dict(zip(terms, row, strict=True)) for row in arrays["terms"].tolist()]
    count = len(columns["stream"])
    return [
        WalkRecord(**{name: column[i] for name, column in columns.items()}) for i in range(count)
    ]


def _joined(parts: Iterable[np.ndarray], kind: Any) -> np.ndarray:
    return np.concatenate(
        [np.empty(0, dtype=kind), *(np.asarray(part, dtype=kind) for part in parts)]
    )


def write_evidence(
    path: str | Path, evidence: Mapping[str, tuple[Sequence[WalkRecord], Vector]]
) -> Path:
    """Write walks and closed streams by key to an .npz beside `path`, sync it and rename it there. ResultsError when the disk refuses."""
    target = Path(path)
    head: dict[str, Any] = {"format": FORMAT, "keys": []}
    arrays: Arrays = {}
    for i, (key, (walks, closed)) in enumerate(evidence.items()):
        header, packed = pack_walks(walks)
        head["keys"].append({"key": key, "closed": dict(closed), **header})
        arrays |= {f"{i}/{name}": array for name, array in packed.items()}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            np.savez(handle, head=np.array(json.dumps(head)), **arrays)  # type: ignore[arg-type]

    replace_file(target, write)
    return target


def read_evidence(path: str | Path) -> Evidence:
    """What `write_evidence` wrote. CheckpointError for a missing, damaged or foreign file; pickles are refused."""
    try:
        with Path(path).open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = dict(file)
        head = json.loads(str(arrays.pop("head")))
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']!r}, allowed {FORMAT!r}")
        return {
            entry["key"]: (unpack_walks(entry, _group(arrays, f"{i}/")), entry["closed"])
            for i, entry in enumerate(head["keys"])
        }
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise CheckpointError(
            f"evidence: {path} is no evidence that sdt wrote ({error}); give a run's evidence file."
        ) from error


def _group(arrays: Arrays, prefix: str) -> Arrays:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
