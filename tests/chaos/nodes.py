"""Loses whole nodes of a cluster on this machine; run as a process of its own: `python -m tests.chaos.nodes folder kills`.

Two nodes hold a model server and a searcher each, the head only the driver and the controller. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

# a dead node fails at once
_FAST = {
    "initial_delay_ms": 500,
    "period_ms": 500,
    "timeout_ms": 3000,
    "failure_threshold": 5,
}
os.environ.update({f"RAY_health_check_{name}": str(value) for name, value in _FAST.items()})

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from sdt_dist.models.toy import Toy  # noqa: E402
from tests.chaos.killing import ControllerView  # noqa: E402
from tests.chaos.slow import Slow  # noqa: E402
from tests.fleet_helpers import TOY, alone, same, toy_work  # noqa: E402
from tests.ray_helpers import run_all, wait_until  # noqa: E402

PLACE = {"sdt-role": "search"}
FLEET = {
    "servers": 2,
    "searchers": 2,
    "problems_per_searcher": 2,
    "max_attempts": 20,
    "server": {
        "cpus": 1.5,
        "labels": PLACE,
    },  # of a node's two CPUs: a server and a searcher on each
    "searcher": {"cpus": 0.5, "labels": PLACE},
}


def _add_node(cluster: Cluster):
    return cluster.add_node(num_cpus=2, labels=PLACE, include_dashboard=False)


def _lose_nodes(cluster: Cluster, nodes: list, kills: int, found: dict) -> None:
    """Lose a random node with a server and a searcher on it, add another one, wait until the fleet is whole again."""
    view = ControllerView()
    rng = random.Random(4)

    def is_whole() -> bool:
        status = view.status()
        return (
            status is not None
            and status["under_way"] > 0
            and all(s["state"] == "ready" for s in status["slots"].values())
        )

    def done() -> int:
        return (view.status() or {"done": -1})["done"]

    for _ in range(kills):
        wait_until(is_whole, 90, "a whole fleet")
        time.sleep(rng.uniform(0.0, 1.0))  # the random instant
        victim = nodes.pop(rng.randrange(len(nodes)))
        held = {a["ActorClassName"] for a in ray._private.state.actors().values()
                if a["State"] == "ALIVE" and a["Address"]["NodeID"] == victim.node_id}  # fmt: skip
        found["held"].append(sorted(held))
        before = done()
        begin = time.monotonic()
        cluster.remove_node(victim, allow_graceful=False)
        wait_until(lambda: done() > before, 60, "a result")  # noqa: B023
        found["result_s"].append(time.monotonic() - begin)
        time.sleep(rng.uniform(0.0, 2.0))  # the cluster is short of a node for a while
        begin = time.monotonic()
        nodes.append(_add_node(cluster))
        wait_until(is_whole, 90, "a whole fleet on another node")
        found["replaced_s"].append(time.monotonic() - begin)


def main(folder: str, kills: int) -> None:
    slow = Path(folder) / "slow"
    slow.touch()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes = [_add_node(cluster), _add_node(cluster)]
    ray.init(address=cluster.address, namespace="chaos", log_to_driver=False, logging_level="ERROR")
    work = toy_work(
        Toy(*TOY),
        {name: {"num_samples": 4, "num_rollouts": 40} for name in ("residual_ts", "dts")},
        150,
    )
    found: dict = {"held": [], "result_s": [], "replaced_s": [], "error": ""}
    statuses: list[dict] = []
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as beside:  # a node can be started from the main thread only
        run = beside.submit(
            run_all, work, partial(Slow, 0.25, str(slow)), watch=statuses.append, **FLEET
        )
        try:
            _lose_nodes(cluster, nodes, kills, found)
        except AssertionError as error:
            found["error"] = str(error)
        slow.unlink()
        outcomes = run.result()
    found["wall_s"] = time.monotonic() - begin
    found["notes"] = (
        f"{statuses[-1]['restarted_searches']} searches started again; replacement: from when a node was added"
    )
    found["complete"] = outcomes.keys() == {w.name for w in work}
    found["different"] = [w.name for w in work if not same(outcomes[w.name], alone(Toy(*TOY), w))]
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
