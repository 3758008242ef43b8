"""Evidence without searches: records, keys, the store's merge rule against an oracle, files, trees from walks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.protocols import PriorLaw
from sdt_dist.values.extract import walks_of
from sdt_dist.values.files import pack_walks, unpack_walks
from sdt_dist.values.keys import evidence_key, shard_of
from sdt_dist.values.records import ShareRequest, WalkRecord, covers, stream_name
from sdt_dist.values.reweigh import reweigh
from sdt_dist.values.store import EvidenceStore
from sdt_dist.values.tree import EvidenceTree
from tests.search_helpers import law_of, run_toy, toy
from tests.sharing_helpers import run_teams

STREAMS = [
    stream_name("r/0", searcher, incarnation) for searcher, incarnation in [(0, 0), (1, 0), (1, 1)]
]
FACTS = {
    "model": "m", "tokenizer": "t", "law": PriorLaw((0, 5)), "max_new_tokens": 3, "reward": "spectral", "context": b"c",
}  # fmt: skip


def record(stream: str, number: int, known: dict[str, int]) -> WalkRecord:
    """A walk whose content only its name decides."""
    tokens = np.array([number, STREAMS.index(stream)], dtype=np.int32)
    steps = (np.log([0.5, 0.25]), np.log([0.5, 0.75]), np.array([3, 3], dtype=np.int32))
    return WalkRecord(
        stream,
        number,
        number,
        tokens,
        *steps,
        {"a": float(number), "b": 1.0},
        0.5,
        known,
        7 + number,
    )


@st.composite
def histories(draw) -> list[WalkRecord]:
    """Walks in an order in which they could have been made: each knows some that were made before, closed."""
    walks: list[WalkRecord] = []
    counts = dict.fromkeys(STREAMS, 0)
    views: list[dict[str, int]] = [{}]
    for _ in range(draw(st.integers(0, 12))):
        stream = draw(st.sampled_from(STREAMS))
        seen = draw(st.lists(st.sampled_from(walks), max_size=3)) if walks else []
        known = {stream: counts[stream]} if counts[stream] else {}
        for other in [*seen, *(w for w in walks if w.stream == stream)]:
            for name, count in [*other.known.items(), (other.stream, other.number + 1)]:
                if name != stream:
                    known[name] = max(known.get(name, 0), count)
        walks.append(record(stream, counts[stream], known))
        views.append(known)
        counts[stream] += 1
    return walks


def oracle(delivered: list[WalkRecord]) -> dict[str, int]:
    """The largest set of delivered walks that is a prefix of every stream and closed, by brute force."""
    have = {(walk.stream, walk.number): walk for walk in delivered}
    best = {stream: sum((stream, n) in have for n in range(99)) for stream in STREAMS}
    while True:
        for stream in STREAMS:
            ok = 0
            while (
                (walk := have.get((stream, ok)))
                and ok < best[stream]
                and covers(best | {stream: ok}, walk.known)
            ):
                ok += 1
            if ok < best[stream]:
                best[stream] = ok
                break
        else:
            return {stream: count for stream, count in best.items() if count}


@settings(max_examples=400, deadline=None)
@given(histories(), st.data())
def test_any_order_repetition_and_loss_makes_a_store_older_but_never_wrong(walks, data):
    sent = data.draw(st.lists(st.sampled_from(walks), max_size=30)) if walks else []
    cuts = data.draw(st.lists(st.integers(0, len(sent)), max_size=4))
    store = EvidenceStore()
    delivered = []
    reader: list[WalkRecord] = []
    known: dict[str, int] = {}
    edges = sorted({0, *cuts, len(sent)})
    for begin, end in pairwise(edges):
        delivered += sent[begin:end]
        (reply,) = store.exchange([ShareRequest("k", "r/0", tuple(sent[begin:end]), dict(known))])
        assert store.held("k") == reply.held == oracle(delivered)
        for walk in reply.walks:
            assert known.get(walk.stream, 0) == walk.number
            assert covers(known, walk.known)
            known[walk.stream] = walk.number + 1
            reader.append(walk)
        assert known == reply.held
    store.add("k", walks)
    (reply,) = store.exchange([ShareRequest("k", "r/0", (), known)])
    assert len(reader) + len(reply.walks) == len(walks)
    assert store.stats()["waiting"] == 0


def test_the_history_of_a_set_does_not_matter_to_a_snapshot(tmp_path):
    walks = [record(STREAMS[0], n, {STREAMS[0]: n} if n else {}) for n in range(3)]
    waiting = record(STREAMS[1], 1, {STREAMS[0]: 3})
    store = EvidenceStore()
    store.add("k", [walks[2], waiting, walks[0]], {STREAMS[0]: 3})
    store.snapshot(tmp_path / "s.npz")
    again = EvidenceStore()
    again.restore(tmp_path / "s.npz")
    again.restore(tmp_path / "s.npz")
    assert again.held("k") == {STREAMS[0]: 1}
    assert again.stats() == store.stats() | {"bytes": again.stats()["bytes"]}
    again.add("k", [walks[1], record(STREAMS[1], 0, {})])
    assert again.held("k") == {STREAMS[0]: 3, STREAMS[1]: 2}
    (reply,) = again.exchange([ShareRequest("k", "r/0")])
    assert reply.closed == {STREAMS[0]: 3}
    assert not list(tmp_path.glob("*.tmp"))


def test_teams_see_their_own_walks_only_and_forgotten_keys_are_gone():
    store = EvidenceStore()
    other = replace(record(STREAMS[0], 0, {}), stream=stream_name("q/0", 0, 0))
    store.add("k", [record(STREAMS[0], 0, {}), other])
    (reply,) = store.exchange([ShareRequest("k", "r/0")])
    assert [walk.team for walk in reply.walks] == ["r/0"]
    assert reply.held == {STREAMS[0]: 1, "q/0/0/0": 1}
    store.forget("k")
    assert store.keys() == [] and store.walks("k") == []


def test_two_walks_under_one_name_are_refused():
    store = EvidenceStore()
    walk = record(STREAMS[0], 0, {})
    store.add("k", [walk, replace(walk)])
    with pytest.raises(ConfigurationError, match=r"r/0/0/0.*incarnation"):
        store.add("k", [replace(walk, log_omega=0.0)])
    with pytest.raises(ConfigurationError, match="reward terms"):
        store.add("k", [replace(walk, number=1, components={"c": 0.0})])
    assert store.stats()["walks"] == 1


def test_packing_keeps_every_bit():
    walks = walks_of(run_toy("A", "residual_ts", 0, num_rollouts=30, wave_size=4).snapshot, "one")
    header, arrays = pack_walks(walks)
    back = unpack_walks(json.loads(json.dumps(header)), arrays)
    for walk, again in zip(walks, back, strict=True):
        for field in fields(WalkRecord):
            ours = getattr(walk, field.name)
            theirs = getattr(again, field.name)
            assert np.array_equal(ours, theirs) and getattr(ours, "dtype", 0) == getattr(
                theirs, "dtype", 0
            )
    assert len({id(walk.known) for walk in back}) == 8
    assert unpack_walks(*pack_walks([])) == []


def test_foreign_and_damaged_files_are_refused(tmp_path):
    store = EvidenceStore()
    store.add("k", [record(STREAMS[0], 0, {})])
    whole = store.snapshot(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no evidence")
    np.savez(tmp_path / "other.npz", head=np.array('{"format": "other/1"}'))
    np.savez(tmp_path / "pickle.npz", head=np.array([{}], dtype=object), allow_pickle=True)
    for name in ("torn.npz", "text.npz", "other.npz", "pickle.npz", "missing.npz"):
        with pytest.raises(CheckpointError, match="evidence"):
            EvidenceStore().restore(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [{"model": "n"}, {"tokenizer": "u"}, {"law": PriorLaw((0, 5), top_k=2)}, {"max_new_tokens": 4}, {"reward": "kl"},
     {"context": b"d"}],
)  # fmt: skip
def test_keys_tell_apart_what_makes_walks_differ(change):
    assert evidence_key(**FACTS) == evidence_key(**FACTS)
    assert evidence_key(**FACTS) != evidence_key(**(FACTS | change))


def test_keys_and_shards_are_the_same_in_every_process():
    code = "from tests.unit.test_values import *; key = evidence_key(**FACTS); print(key, shard_of(key, 7))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == [evidence_key(**FACTS), str(shard_of(evidence_key(**FACTS), 7))]
    assert len({shard_of(str(i), 4) for i in range(50)}) == 4


@pytest.mark.parametrize(("name", "wave_size"), [("A", 1), ("A", 8), ("D", 32)])
def test_a_finished_search_gives_walks_that_estimate_the_same(name, wave_size):
    """Re-weighting to the search's own lambda is its own estimate, and the tree of its walks is its own tree."""
    result = run_toy(name, "residual_ts", 3, num_rollouts=120, wave_size=wave_size)
    model = toy(name)
    walks = walks_of(result.snapshot, "run")
    again = reweigh(walks, model.multipliers, model.inverse_temperature)
    assert again.log_z == pytest.approx(result.log_z, abs=1e-12)
    assert again.log_z_error == pytest.approx(result.log_z_error, rel=1e-9)
    assert again.ess == pytest.approx(result.ess, rel=1e-9)
    law = dict(result.distribution())
    assert {s: pytest.approx(p, rel=1e-9) for s, p in law.items()} == {
        s: p for s, p in zip(again.sequences, again.probabilities, strict=True) if s in law
    }
    tree = EvidenceTree(model.inverse_temperature, model.multipliers)
    tree.join(walks)
    masses = ("log_known", "log_unknown", "log_open", "log_rate", "log_residual")
    for node in range(result.tree.size):
        (same,) = [n for n in [_find(tree.tree, result.tree.tokens(node))] if n is not None]
        for mass in masses:
            ours = tree.tree.nodes[mass][same]
            assert ours == pytest.approx(result.tree.nodes[mass][node], abs=1e-9) or ours == -np.inf
        assert tree.tree.nodes["num_remaining"][same] == result.tree.nodes["num_remaining"][node]


def _find(tree, tokens) -> int | None:
    node = 0
    for token in tokens:
        node = next((c for c in tree.children(node) if tree.nodes["token"][c] == token), -1)
        if node < 0:
            return None
    return node


def test_a_tree_is_a_pure_function_of_its_walks():
    """Bit for bit, whatever the order in which streams were joined and in however many steps."""
    (result,) = run_teams("A", 60, 3, wave_size=2)
    walks = walks_of(result.snapshot, "run")
    rng = np.random.default_rng(0)
    trees = []
    for _ in range(3):
        order = iter(rng.permutation([walk.stream for walk in walks]))
        queues = {
            w.stream: sorted((v for v in walks if v.stream == w.stream), key=lambda v: v.number)
            for w in walks
        }
        tree = EvidenceTree(2.0, {"toy": 1.0})
        for stream in order:
            tree.join([queues[stream].pop(0)])
        nodes = tree.tree.nodes
        named = {tree.tree.tokens(n): nodes[n] for n in range(tree.tree.size)}
        wanted = (
            "log_prior",
            "log_residual",
            "num_remaining",
            "log_known",
            "log_unknown",
            "log_open",
            "log_rate",
            "visits",
        )
        trees.append({t: tuple(record[f] for f in wanted) for t, record in named.items()})
    assert trees[0] == trees[1] == trees[2]


def test_soft_values_of_all_walks_are_exact_at_any_lambda():
    """An exhausted toy: the store's values at another lambda are the exact ones there."""
    walks = walks_of(
        run_toy("A", "residual_ts", 0, num_rollouts=2000, wave_size=16).snapshot, "run"
    )
    store = EvidenceStore()
    model = toy("A")
    store.add("k", walks)
    prefixes = [(), (0,), (3, 1), (4, 4, 4, 4)]
    masses = np.exp(model.log_prior + 2.0 * 0.5 * model.rewards)
    for _ in range(2):
        values = store.soft_values("k", prefixes, 2.0, {"toy": 0.5})
        for prefix, value in zip(prefixes, values, strict=True):
            below = model.vocab_size ** (model.length - len(prefix))
            start = model.index(prefix) * below
            prior = np.exp(model.log_prior[start : start + below]).sum()
            assert value == pytest.approx(
                np.log(masses[start : start + below].sum() / prior) / 2.0, abs=1e-9
            )


def test_soft_values_outside_the_tree_are_what_a_new_node_starts_with():
    walks = walks_of(run_toy("A", "residual_ts", 0, num_rollouts=4, wave_size=1).snapshot, "run")
    store = EvidenceStore()
    assert store.soft_values("k", [(), (1, 2)], 5.0, {"toy": 1.0}).tolist() == [0.0, 0.0]
    store.add("k", walks[:2])
    before = store.soft_values("k", [()], 5.0, {"toy": 1.0})
    store.add("k", walks)
    tree = EvidenceTree(5.0, {"toy": 1.0})
    tree.join(walks)
    unseen = next(t for t in range(5) if t not in tree.tree.child_tokens(0))
    values = store.soft_values("k", [(), (unseen,), (unseen, 0)], 5.0, {"toy": 1.0})
    assert values[0] != before[0]
    assert values[1] == values[2] == pytest.approx(tree.tree.nodes["log_rate"][0] / 5.0)
    with pytest.raises(ConfigurationError, match="toy"):
        store.soft_values("k", [()], 5.0, {"other": 1.0})


def test_nothing_to_reweigh_is_refused():
    with pytest.raises(ConfigurationError, match="walks"):
        reweigh([], {"toy": 1.0}, 1.0)
    walks = walks_of(run_toy("A", "residual_ts", 0, num_rollouts=4).snapshot, "run")
    with pytest.raises(ConfigurationError, match="inverse_temperature"):
        reweigh(walks, {"toy": 1.0}, 0.0)
    with pytest.raises(ConfigurationError, match="residual_ts"):
        walks_of(run_toy("A", "dts", 0, num_rollouts=4).snapshot, "run")


def test_reweighted_laws_are_laws():
    walks = walks_of(run_toy("A", "residual_ts", 0, num_rollouts=40).snapshot, "run")
    found = reweigh(walks, {"toy": 2.0}, 1.5)
    assert found.probabilities.sum() == pytest.approx(1.0)
    assert found.rewards.tolist() == [
        2.0 * toy("A").rewards[toy("A").index(s)] for s in found.sequences
    ]
    assert law_of(run_toy("A", "residual_ts", 0, num_rollouts=40), toy("A")).sum() == pytest.approx(
        1.0
    )
