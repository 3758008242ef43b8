"""Trajectories out of saved searches, and the rows of p that turn a tree's few siblings into all of them.

See docs/concepts/flow.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.process import ModelProcess
from sdt_dist.noise import exponential, gumbel, stream_key
from sdt_dist.protocols import ExpandRequest, Expansion, Root
from sdt_dist.training.flow.trajectories import Candidates, Trajectory, horvitz_thompson_log_weights
from sdt_dist.tree.kernels import find_child
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.tree.tree import Tree

_ROWS_A_CALL = 256
_REACH = 5.0  # standard deviations
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens [K], log p, log w


def trajectories_of(snapshot: Snapshot, root: Root) -> list[Trajectory]:
    """Every finished sequence of a saved tree search, with its nodes' children as candidates.

    Children carry w_b = p_b / sum of p over the children: the mass outside them is spread on them in proportion, as if
    tokens that were never looked at were worth as much as those that were. That is an approximation unless a node's
    row is complete; `with_rows` removes it. Sequences that the tree does not hold (draws by fall) are left out. A tree
    with masses (residual_ts, s_adt) gives its estimates v = (1/lambda) log M as soft values at its search's lambda.
    ConfigurationError for a tree of blocks or another prompt's search.
    """
    if snapshot.blocks:
        raise ConfigurationError(
            "flow: a tree of token blocks, allowed: trees of tokens; search without block_size."
        )
    if snapshot.header["prompt"] != root.digest.hex():
        raise ConfigurationError(
            f"flow: the search was for prompt {snapshot.header['prompt']}, given {root.digest.hex()}."
        )
    log_omega = _log_omegas(snapshot)
    values = _tree_values(snapshot)
    source = {name: snapshot.header[name] for name in ("method", "seed", "problem")}
    known = {
        sequence: float(reward)
        for sequence, reward in zip(snapshot.sequences, snapshot.rewards, strict=True)
    }
    found = []
    for i, (sequence, reward) in enumerate(known.items()):
        path = _path(snapshot.tree, sequence)
        if path is None:
            continue
        steps = [
            _children(snapshot.tree, node, sequence[:t], known) for t, node in enumerate(path[:-1])
        ]
        found.append(
            Trajectory(
                root.digest.hex(),
                np.array(root.prompt, dtype=np.int32),
                np.array(sequence, dtype=np.int32),
                snapshot.tree.nodes["log_prior"][path[1:]].copy(),
                Candidates.join(steps),
                reward,
                log_omega.get(i),
                None if values is None else values[path],
                None
                if values is None
                else float(snapshot.header["options"]["inverse_temperature"]),
                source,
            )
        )
    return found


def with_rows(
    process: ModelProcess,
    root: Root,
    trajectories: Sequence[Trajectory],
    num_children: int | None = None,
    seed: int = 0,
    *,
    ordered: bool = False,
) -> list[Trajectory]:
    """The trajectories of one context with candidates straight from p: complete rows, or fewer that stand for them.

    num_children: None for every token with p > 0 (w = p, exact); else that many tokens of each row by Gumbel noise of
    `seed`, with Horvitz-Thompson weights or, for tokens that are `ordered` values, one of each stratum (`stratified`). The
    trajectory's own token is added with the p that no weight covers: w = 0 unless it was among them. Costs one next-token
    distribution per distinct state, in calls of up to 256.
    """
    low, high = process.law.allowed
    drawn = num_children is not None and not ordered
    size = num_children + 1 if num_children is not None and drawn else high - low
    states = list(
        dict.fromkeys(
            tuple(t.tokens[:i].tolist()) for t in trajectories for i in range(len(t.tokens))
        )
    )
    keys = [row_key(seed, root, state) if drawn else None for state in states]
    requests = [ExpandRequest(root, s, size, k) for s, k in zip(states, keys, strict=True)]
    expansions = dict(expand_by_depth(process, requests, _ROWS_A_CALL))
    rewards = {t.key[1]: t.reward for t in trajectories}
    facts = [_candidates(expansions[i], key, high) for i, key in enumerate(keys)]
    if ordered and num_children is not None:
        of_states = [row_key(seed, root, state) for state in states]
        facts = [
            stratified(row, num_children, key) for row, key in zip(facts, of_states, strict=True)
        ]
    rows = dict(zip(states, facts, strict=True))
    return [_replaced(trajectory, rows, rewards) for trajectory in trajectories]


def expand_by_depth(
    process: ModelProcess, requests: Sequence[ExpandRequest], rows_a_call: int
) -> Iterator[tuple[int, Expansion]]:
    """(place, reply) of requests, shortest states first: a backend then has each state's parent in its cache."""
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].tokens))
    for _, level in groupby(order, key=lambda i: len(requests[i].tokens)):
        places = list(level)
        for begin in range(0, len(places), rows_a_call):
            part = places[begin : begin + rows_a_call]
            yield from zip(part, process.expand([requests[i] for i in part]), strict=True)


def _replaced(
    trajectory: Trajectory,
    rows: dict[tuple[int, ...], Row],
    rewards: dict[tuple[int, ...], float],
) -> Trajectory:
    steps = []
    tokens = tuple(trajectory.tokens.tolist())
    for t, token in enumerate(tokens):
        candidates, log_prob, log_weight = with_token(
            rows[tokens[:t]], token, float(trajectory.log_prob[t])
        )
        reward = np.array([rewards.get((*tokens[:t], c), np.nan) for c in candidates.tolist()])
        steps.append((candidates, log_prob, log_weight, reward))
    return replace(trajectory, candidates=Candidates.join(steps))


def with_token(row: Row, token: int, log_prob: float) -> Row:
    """A row with a trajectory's own token: where no draw had it, with the p that no weight covers (w = 0)."""
    if token in row[0]:
        return row
    return np.append(row[0], token), np.append(row[1], log_prob), np.append(row[2], -np.inf)


def stratified(row: Row, num_strata: int, key: int) -> Row:
    """At most `num_strata` tokens that stand for a complete row of ordered tokens: one drawn from each stratum by its p.

    Strata are neighbouring tokens, equally wide over 5 standard deviations to either side of the row's mean, the outermost
    open; a token drawn has its stratum's mass as weight. So sum_b w_b f(b) has expectation E_p f for any f, with little
    variance for smooth ones (Cochran, Sampling Techniques, 1977, chapter 5). key: of the noise.
    """
    tokens, log_prob, _ = row
    order = np.argsort(tokens, kind="stable")
    tokens = tokens[order]
    log_prob = log_prob[order]
    prob = np.exp(log_prob)
    prob = prob / prob.sum()
    mean = prob @ tokens
    spread = max(float(np.sqrt(prob @ (tokens - mean) ** 2)), 1e-9)
    stratum = np.clip(
        ((tokens - mean) / spread + _REACH) * num_strata / (2 * _REACH), 0, num_strata - 1
    ).astype(np.int64)
    begin = np.flatnonzero(np.diff(stratum, prepend=-1))
    end = np.append(begin[1:], len(tokens))
    reached = np.cumsum(prob)
    before = np.append(0.0, reached)[begin]
    mass = reached[end - 1] - before
    shares = -np.expm1(-exponential(np.array([key], dtype=np.uint64), len(begin))[0])  # uniform
    place = np.clip(np.searchsorted(reached, before + shares * mass, side="right"), begin, end - 1)
    kept = mass > 0
    return tokens[place][kept], log_prob[place][kept], np.log(mass[kept])


def _candidates(expansion: Expansion, key: int | None, num_tokens: int) -> Row:
    """(tokens, log p, log w) of an expansion; with a key, its last child only gives the threshold kappa."""
    if key is None or expansion.num_remaining == 0:
        return expansion.children, expansion.log_prob, expansion.log_prob
    noise = gumbel(np.array([key], dtype=np.uint64), num_tokens)[0, expansion.children]
    kept = expansion.children[:-1]
    log_prob = expansion.log_prob[:-1]
    return (
        kept,
        log_prob,
        horvitz_thompson_log_weights(log_prob, float(expansion.log_prob[-1] + noise[-1])),
    )


def row_key(seed: int, root: Root, state: tuple[int, ...]) -> int:
    """The row key of the noise that draws a state's candidates."""
    return stream_key(seed, root.digest.hex(), "flow rows", *state)


def _log_omegas(snapshot: Snapshot) -> dict[int, float]:
    """log omega by sequence, of the first walk that found it; a residual_ts search on its own notes them."""
    notes = snapshot.notes
    if "sample" not in notes or "log_omega" not in notes:
        return {}
    pairs = zip(notes["sample"].tolist(), notes["log_omega"].tolist(), strict=True)
    return dict(reversed(list(pairs)))


def _tree_values(snapshot: Snapshot) -> np.ndarray | None:
    """v = (1/lambda) log(K + U) [N] of every node, NaN where it stands for nothing; None for a tree without masses."""
    nodes = snapshot.tree.nodes[: snapshot.tree.size]
    log_mass = np.logaddexp(nodes["log_known"], nodes["log_unknown"])
    if nodes["log_known"][0] == -np.inf:
        return None
    return (
        np.where(np.isfinite(log_mass), log_mass, np.nan)
        / snapshot.header["options"]["inverse_temperature"]
    )


def _path(tree: Tree, sequence: tuple[int, ...]) -> list[int] | None:
    """Nodes [n + 1] from the root along a sequence, or None where the tree does not hold it."""
    path = [0]
    for token in sequence:
        node = int(find_child(tree.nodes, path[-1], token))
        if node < 0:
            return None
        path.append(node)
    return path


def _children(
    tree: Tree, node: int, prefix: tuple[int, ...], rewards: dict[tuple[int, ...], float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, log p, log w, reward where finished) of a node's children."""
    children = np.array(tree.children(node))
    tokens = tree.nodes["token"][children]
    log_prob = tree.nodes["log_prior"][children]
    reward = np.array([rewards.get((*prefix, token), np.nan) for token in tokens.tolist()])
    return tokens, log_prob, log_prob - np.logaddexp.reduce(log_prob), reward
