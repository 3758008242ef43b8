"""Cost of the tree itself: selection, path weights and backup per rollout, and bytes per node.

    python -m benchmarks.tree_cost

Workload: 64 problems, each with a spine of depth 32 whose nodes have 8 children and lead nearly all mass down the
spine, so that every walk and every backup passes 32 nodes of 8 children. Compilation is reported apart.
"""

from __future__ import annotations

import time

import numpy as np

from sdt_dist.protocols import Rollout
from sdt_dist.search.loop import Walk
from sdt_dist.search.methods.residual_ts import MassRule, ResidualOptions
from sdt_dist.tree.mass import backup_mass, walk_mass
from sdt_dist.tree.tree import Tree

DEPTH = 32
CHILDREN = 8
PROBLEMS = 64
ROLLOUTS = 100
TARGET_US = 50.0
TARGET_BYTES = 200.0
NODES = 1_000_000


def _rollout(tokens: list[int], log_prob: float, residual: float) -> Rollout:
    count = len(tokens)
    return Rollout(
        np.array(tokens, dtype=np.int32),
        np.full(count, log_prob),
        np.full(count, residual),
        np.full(count, 1000, dtype=np.int32),
        "length",
    )


def spine() -> Tree:
    """A tree whose root-to-leaf spine has DEPTH nodes of CHILDREN children each."""
    tree = Tree()
    for depth in range(DEPTH):
        start = 0
        for _ in range(depth):
            start = tree.children(start)[0]
        for token in range(CHILDREN):
            leaf = tree.attach_rollout(
                start, _rollout([token], -5.0 if token else -0.01, -40.0), finished=token > 0
            )
            if token > 0:
                tree.set_reward(leaf, -10.0, 1.0)
    tree.nodes["log_unknown"][tree.size - CHILDREN] = 5.0
    backup_mass(tree.nodes, tree.size - 1)
    return tree


def time_rollouts() -> tuple[float, float, float]:
    """(compile seconds, microseconds per rollout, mean depth of walks)."""
    begin = time.perf_counter()
    trees = [spine() for _ in range(PROBLEMS)]
    rule = MassRule(ResidualOptions(), [])
    walk_mass(trees[0].nodes, np.uint64(1), 0.25)
    compiled = time.perf_counter() - begin
    elapsed = 0.0
    depths = 0
    for number in range(ROLLOUTS):
        for problem, tree in enumerate(trees):
            walk = Walk(number, np.uint64(problem * 100_003 + number), 0)
            begin = time.perf_counter()
            rule.select(tree, walk)
            elapsed += time.perf_counter() - begin
            depths += tree.depth(walk.node)
            begin = time.perf_counter()
            rule.backup(tree, tree.size - 1)
            elapsed += time.perf_counter() - begin
    return compiled, 1e6 * elapsed / (ROLLOUTS * PROBLEMS), depths / (ROLLOUTS * PROBLEMS)


def bytes_per_node() -> float:
    """Bytes of the node array per node after growing one tree to NODES nodes by rollouts of 100 tokens."""
    tree = Tree()
    rng = np.random.default_rng(0)
    while tree.size < NODES:
        tree.attach_rollout(
            0, _rollout(rng.integers(0, 1 << 30, 100).tolist(), -3.0, -0.1), finished=True
        )
    return tree.nodes.nbytes / tree.size


def main() -> None:
    compiled, per_rollout, depth = time_rollouts()
    print(f"compilation and set-up            {compiled:8.1f} s")
    print(
        f"selection + path weights + backup {per_rollout:8.1f} us per rollout (aim <= {TARGET_US:.0f})"
    )
    print(
        f"mean depth of the walks           {depth:8.1f} of {DEPTH}, {CHILDREN} children a node, {PROBLEMS} problems"
    )
    print(
        f"node records                      {bytes_per_node():8.1f} bytes a node at {NODES:,} (aim <= {TARGET_BYTES:.0f})"
    )


if __name__ == "__main__":
    main()
