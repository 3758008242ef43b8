"""Walk records of a finished residual_ts search, from what its snapshot keeps.

See docs/concepts/exactness.md#shared-evidence.

So any kept tree can warm-start a search or be re-weighted. It must not know the model or the reward.
"""

from __future__ import annotations

import json

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.noise import stream_key
from sdt_dist.tree.kernels import find_child
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.tree.tree import Tree
from sdt_dist.values.files import pack_walks, unpack_walks
from sdt_dist.values.join import outside_masses, path_facts
from sdt_dist.values.records import WalkRecord, stream_name

_WALKS = "walks/"


def notes_of(walks: list[WalkRecord]) -> dict[str, np.ndarray]:
    """Walks as a snapshot's notes, for searches that joined others' walks."""
    header, arrays = pack_walks(walks)
    return {f"{_WALKS}head": np.array(json.dumps(header))} | {
        f"{_WALKS}{k}": v for k, v in arrays.items()
    }


def walks_of(snapshot: Snapshot, run: str) -> list[WalkRecord]:
    """The walks of a finished residual_ts search, each after all that its vector names.

    run: a name that no other run's evidence has; a search that joined others' walks already has its streams' names.
    ConfigurationError for another method's search.
    """
    if snapshot.header.get("method") != "residual_ts":
        raise ConfigurationError(
            f"evidence: a search by {snapshot.header.get('method')!r}, allowed: residual_ts, whose walks carry their "
            "path weights."
        )
    notes = snapshot.notes
    if f"{_WALKS}head" in notes:
        arrays = {k.removeprefix(_WALKS): v for k, v in notes.items() if k.startswith(_WALKS)}
        return unpack_walks(json.loads(str(arrays.pop("head"))), arrays)
    return _solo_walks(snapshot, run)


def _solo_walks(snapshot: Snapshot, run: str) -> list[WalkRecord]:
    """One stream; a walk's vector is the count of walks before its wave."""
    seed = snapshot.header["seed"]
    problem = snapshot.header["problem"]
    stream = stream_name(f"{run}/{problem}", 0, 0)
    ends = snapshot.notes["wave_end"]
    found = snapshot.notes["sample"].tolist()
    vectors = {n: {stream: n} if n else {} for n in np.searchsorted(ends, ends).tolist()}
    facts = _facts(snapshot.tree, [snapshot.sequences[i] for i in found])
    return [
        WalkRecord(
            stream=stream,
            number=i,
            ticket=i,
            tokens=np.array(snapshot.sequences[sample], dtype=np.int32),
            log_prob=facts[i][0],
            log_outside=facts[i][1],
            support=facts[i][2],
            components={name: float(term[sample]) for name, term in snapshot.components.items()},
            log_omega=float(snapshot.notes["log_omega"][i]),
            known=vectors[begin],
            noise=stream_key(seed, problem, "arms", 0, i),
        )
        for i, (sample, begin) in enumerate(
            zip(found, np.searchsorted(ends, ends).tolist(), strict=True)
        )
    ]


def _facts(
    tree: Tree, sequences: list[tuple[int, ...]]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(log_prob, log_outside, support) [n] of the steps of sequences that the tree holds."""
    outside, support = outside_masses(tree.nodes, tree.size)
    facts = []
    for sequence in sequences:
        node = 0
        for token in sequence:
            node = find_child(tree.nodes, node, token)
            assert node >= 0, "a ticket's sequence is in its tree"
        facts.append(path_facts(tree.nodes, outside, support, node))
    return facts
