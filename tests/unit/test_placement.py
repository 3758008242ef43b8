"""What fits on which node, and what is said when something does not.

See docs/architecture/fleet.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from sdt_dist.actors.config import Placement, fleet_config
from sdt_dist.actors.placement import (
    ActorRequest,
    Node,
    check_placement,
    fleet_requests,
    plan_placement,
)
from sdt_dist.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
GPU_NODE = Node(
    "gpu",
    {"CPU": 8.0, "GPU": 2.0},
    {"sdt-role": "model-server", "zone": "a", "ray.io/node-id": "f00"},
)
CPU_NODE = Node("cpu", {"CPU": 4.0}, {"sdt-role": "searcher", "zone": "a"})


def _request(
    kind: str = "server", count: int = 1, cpus: float = 0.0, gpus: float = 0.0, **labels: str
) -> ActorRequest:
    named = {key.replace("_", "-"): value for key, value in labels.items()}
    return ActorRequest(kind, count, Placement(cpus=cpus, gpus=gpus, labels=named))


def _refused(requests: list[ActorRequest], nodes: list[Node]) -> str:
    with pytest.raises(ConfigurationError) as error:
        check_placement(requests, nodes)
    return str(error.value)


def test_local_mode_fits_on_two_cores_and_on_one():
    for cores in (1.2, 2.0):
        plan = check_placement(fleet_requests(fleet_config({})), [Node("here", {"CPU": cores})])
        assert (
            plan.on("server") == {"here": 1}
            and plan.on("searcher") == {"here": 1}
            and not plan.missing
        )


def test_shards_are_asked_for_only_when_evidence_is_shared():
    config = fleet_config({"shards": 3})
    assert [request.kind for request in fleet_requests(config)] == ["server", "searcher"]
    assert fleet_requests(config, shards=True)[-1] == ActorRequest("shard", 3, config.shard)


def test_every_group_of_a_mixed_fleet_is_placed_by_its_own_wishes():
    """The fleet that docs/guides/clusters.md shows, on nodes as it describes them."""
    (shown,) = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs/guides/clusters.md").read_text(), flags=re.DOTALL
    )
    config = fleet_config(yaml.safe_load(shown))
    nodes = [
        *(
            Node(f"gpu{i}", {"CPU": 8.0, "GPU": 2.0}, {"sdt-role": "model-server"})
            for i in range(2)
        ),
        *(Node(f"cpu{i}", {"CPU": 24.0}, {"sdt-role": "searcher"}) for i in range(2)),
        Node("tunnel", {"CPU": 1.0}, {"sdt-mac": "tunnel"}),
    ]
    plan = check_placement(fleet_requests(config, shards=True), nodes)
    assert plan.on("server") == {"gpu0": 2, "gpu1": 2}
    assert plan.on("server of http://127.0.0.1:8011") == {"tunnel": 1}
    assert sum(plan.on("server of hf:/srv/llama").values()) == 8
    said = _refused(fleet_requests(config), nodes[:-1])
    assert "1 x server of http://127.0.0.1:8011: no live node carries label sdt-mac=tunnel" in said


def test_labels_decide_where_actors_go():
    requests = [
        _request("searcher", 3, cpus=1.0, sdt_role="searcher"),
        _request("server", 2, gpus=1.0, cpus=1.0),
    ]
    plan = check_placement(requests, [GPU_NODE, CPU_NODE])
    assert plan.on("searcher") == {"cpu": 3}
    assert plan.on("server") == {"gpu": 2}
    assert sorted(plan.lines()) == ["2 x server on gpu", "3 x searcher on cpu"]


def test_those_without_gpu_leave_gpu_nodes_to_those_with():
    plan = check_placement([_request("searcher", 5, cpus=1.0)], [GPU_NODE, CPU_NODE])
    assert plan.on("searcher") == {"cpu": 4, "gpu": 1}


def test_the_most_constrained_kind_is_packed_first():
    small = Node("small", {"CPU": 2.0})
    large = Node("large", {"CPU": 2.0}, {"disk": "fast"})
    requests = [_request("searcher", 2, cpus=1.0), _request("shard", 1, cpus=2.0, disk="fast")]
    for nodes in itertools.permutations([small, large]):
        plan = check_placement(requests, list(nodes))
        assert plan.on("shard") == {"large": 1} and plan.on("searcher") == {"small": 2}


def test_a_node_of_the_same_name_counts_too():
    twins = [Node("10.0.0.1", {"CPU": 1.0}, node_id=str(i)) for i in range(2)]
    assert check_placement([_request(count=2, cpus=1.0)], twins).on("server") == {"10.0.0.1": 2}


def test_tenths_of_a_core_add_up():
    assert check_placement([_request(count=10, cpus=0.1)], [Node("here", {"CPU": 1.0})]).on(
        "server"
    ) == {"here": 10}


def test_an_actor_that_asks_for_nothing_fits_on_any_live_node():
    assert check_placement([_request(count=100)], [Node("head", {})]).on("server") == {"head": 100}


def test_a_label_that_no_node_carries_is_named_with_those_that_exist():
    said = _refused([_request(count=2, sdt_role="model-servr")], [GPU_NODE, CPU_NODE])
    assert "2 x server: no live node carries label sdt-role=model-servr" in said
    assert "Did you mean sdt-role=model-server?" in said
    assert "Labels there: sdt-role=model-server, sdt-role=searcher, zone=a." in said
    assert "ray start --labels sdt-role=model-servr" in said
    assert "ray.io/node-id" not in said


def test_rays_own_labels_can_be_asked_for():
    a10 = Node("a10", {"CPU": 4.0}, {"ray.io/accelerator-type": "A10G", "ray.io/node-id": "1"})
    request = ActorRequest("server", 1, Placement(labels={"ray.io/accelerator-type": "A10G"}))
    assert check_placement([request], [a10]).on("server") == {"a10": 1}
    other = ActorRequest("server", 1, Placement(labels={"ray.io/accelerator-type": "H100"}))
    assert "Did you mean ray.io/accelerator-type=A10G" in _refused([other], [a10])


def test_no_labels_at_all_is_said():
    assert "Labels there: none." in _refused([_request(zone="b")], [Node("here", {"CPU": 1.0})])


def test_labels_that_exist_but_never_together():
    said = _refused(
        [_request(sdt_role="searcher", disk="fast")],
        [CPU_NODE, Node("x", {"CPU": 9.0}, {"disk": "fast"})],
    )
    assert "no single node carries all of sdt-role=searcher and disk=fast" in said


@pytest.mark.parametrize("value", ["!searcher", "in(a,b)", "", "-x", "a b"])
def test_selector_expressions_are_no_label_values(value):
    assert "allowed is one exact value" in _refused([_request(sdt_role=value)], [CPU_NODE])


def test_an_actor_larger_than_every_node():
    said = _refused([_request(cpus=16.0)], [GPU_NODE, CPU_NODE])
    assert "each needs 16 CPU, and the largest of the 2 live nodes has 8" in said
    assert (
        "each needs 1 GPU, and the largest of the 1 live node with sdt-role=searcher has 0"
        in _refused([_request(gpus=1.0, sdt_role="searcher")], [GPU_NODE, CPU_NODE])
    )


def test_too_many_actors_says_what_is_short_with_amounts():
    said = _refused(
        [_request(count=5, cpus=1.0, gpus=1.0, sdt_role="model-server")], [GPU_NODE, CPU_NODE]
    )
    assert "3 x server: 5 need 5 CPU in all (6 left of 8) and 5 GPU in all (0 left of 2)" in said
    assert "on the 1 live node with sdt-role=model-server" in said


def test_dead_nodes_hold_nothing():
    dead = Node("gone", {"CPU": 64.0}, {"sdt-role": "searcher"}, alive=False)
    assert "no live node; start one" in _refused([_request()], [dead])
    assert "no live node carries label sdt-role=searcher" in _refused(
        [_request(sdt_role="searcher")], [dead, GPU_NODE]
    )


def test_one_message_names_everything_that_is_missing():
    said = _refused(
        [_request("server", gpus=9.0), _request("searcher", 1, zone="z")], [GPU_NODE, CPU_NODE]
    )
    assert said.startswith("the cluster cannot hold this fleet. ") and "\n" not in said
    assert (
        "1 x server: each needs 9 GPU" in said
        and "1 x searcher: no live node carries label zone=z" in said
    )


def test_a_plan_never_gives_a_node_more_than_it_has():
    rng = np.random.default_rng(0)
    for _ in range(200):
        nodes = [
            Node(
                f"n{i}",
                {"CPU": float(rng.integers(1, 9)), "GPU": float(rng.integers(0, 3))},
                {"zone": str(rng.integers(2))},
            )
            for i in range(rng.integers(1, 5))
        ]
        requests = [
            _request(
                kind,
                int(rng.integers(1, 6)),
                float(rng.choice([0.1, 0.5, 1, 3])),
                float(rng.choice([0, 0, 0.5, 1])),
            )
            for kind in ("server", "searcher", "shard")
        ]
        plan = plan_placement(requests, nodes)
        for request in requests:
            placed = sum(part.count for part in plan.placed if part.kind == request.kind)
            assert (
                placed + sum(gap.count for gap in plan.missing if gap.kind == request.kind)
                == request.count
            )
        for node, name in itertools.product(nodes, ("CPU", "GPU")):
            used = sum(part.count * request.wants.get(name, 0.0) for part in plan.placed for request in requests
                       if part.kind == request.kind and part.node is node)  # fmt: skip
            assert used <= node.resources[name] + 1e-5
