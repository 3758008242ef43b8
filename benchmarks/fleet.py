"""How near a fleet comes to the throughput of its model servers, and what its own work costs.

See docs/architecture/fleet.md.

    python -m benchmarks.fleet [--window 10] [--sizes 1x1,2x1,4x2,8x4,16x8,32x8]

The model is a fake that takes 200 ms + 200 us a row per call, so that servers, not this machine's cores, are the limit.
Prints Markdown: for S searchers x M servers the rows a second in a steady window, the share of the ideal (every server
that can have a call is busy all the time at the batch size seen), rows per call and batch, and CPU us per leaf of each
kind of actor; then what those figures extrapolate to, with the first bottleneck.
"""

from __future__ import annotations

import argparse
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray

from sdt_dist.actors.config import FleetConfig, fleet_config
from sdt_dist.actors.remote.controller import ControllerActor
from sdt_dist.actors.work import GivenReward, Work
from sdt_dist.noise import mix64
from sdt_dist.protocols import (
    Cost,
    Decoded,
    ExpandRequest,
    Expansion,
    PriorLaw,
    Rollout,
    RolloutRequest,
    Root,
)
from sdt_dist.values.records import Membership

CALL_S = 0.2
ROW_S = 200e-6
# 4 problems a crew, so 32 rows a call
HORIZON = 24
WAVE = 8
PROBLEMS = 8
KINDS = ("model-server", "searcher", "store-shard", "controller")


class FakeModel:
    """Uniform p over 1,024 tokens; every call takes 200 ms + 200 us a row, asleep."""

    vocab_size = 1024
    max_context = 1 << 20
    deterministic = True
    identity = "fake"
    law = PriorLaw((0, 1024))

    def __init__(self) -> None:
        self.nfe = self.model_calls = 0

    def expand(self, requests: Sequence[ExpandRequest], law: PriorLaw) -> list[Expansion]:
        raise NotImplementedError("residual_ts asks for rollouts only")

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]:
        time.sleep(CALL_S + ROW_S * len(requests))
        self.model_calls += 1
        self.nfe += sum(request.num_tokens for request in requests)
        return [self._draw(request) for request in requests]

    def _draw(self, request: RolloutRequest) -> Rollout:
        steps = np.arange(request.num_tokens, dtype=np.uint64)
        tokens = (
            (steps * np.uint64(7919) + np.uint64(mix64(request.key or 0)))
            % np.uint64(self.vocab_size)
        ).astype(np.int32)
        while int(tokens[0]) in request.excluded:
            tokens[0] = (tokens[0] + 1) % self.vocab_size
        remaining = np.full(request.num_tokens, self.vocab_size - 1, dtype=np.int32)
        remaining[0] -= len(request.excluded)
        log_v = np.log(float(self.vocab_size))
        cost = Cost(request.num_tokens, frozenset((self.model_calls - 1,)))
        return Rollout(
            tokens,
            np.full(len(tokens), -log_v),
            np.log(remaining) - log_v,
            remaining,
            "length",
            cost,
        )

    def release(self, root: Root) -> None:
        """Nothing is cached."""


class MeanToken:
    """A reward that costs next to nothing."""

    multipliers = {"mean": 1.0}  # noqa: RUF012

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        return {"mean": np.array([np.mean(sample.tokens) / 1024 for sample in samples])}


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows answered, calls, batches, busy seconds, and CPU seconds by kind of actor, at one moment."""

    at: float
    rows: float
    calls: float
    batches: float
    busy_s: float
    cpu_s: dict[str, float]


def _work(searchers: int, shared: bool) -> list[Work]:
    """More searching than any window lasts; `shared`: every four searches work on one problem."""
    count = searchers * PROBLEMS
    options = {"num_rollouts": 100_000, "wave_size": WAVE, "inverse_temperature": 1.0}
    return [
        Work(
            f"p{i}", i, [0], GivenReward(MeanToken()), "residual_ts", options,
            membership=Membership(f"key{i // 4}", f"run/{i // 4}", i % 4, 4) if shared else None,
        )
        for i in range(count)
    ]  # fmt: skip


def _read(config: FleetConfig, namespace: str, pids: dict[int, str]) -> Reading:
    servers = [ray.get_actor(f"sdt:model-server-{i}", namespace) for i in range(config.servers)]
    states: list[dict[str, Any]] = ray.get([server.status.remote() for server in servers])
    cpu = dict.fromkeys(KINDS, 0.0)
    for pid, kind in pids.items():
        times = psutil.Process(pid).cpu_times()
        cpu[kind] += times.user + times.system
    sums = {
        name: float(sum(state[name] for state in states))
        for name in ("rows", "calls", "batches", "busy_s")
    }
    return Reading(
        time.monotonic(), sums["rows"], sums["calls"], sums["batches"], sums["busy_s"], cpu
    )


def _pids() -> dict[int, str]:
    """Process ids of this run's actors by kind, from Ray's own list."""
    from ray.util.state import list_actors

    kinds = {
        "ModelServerActor": "model-server",
        "SearcherActor": "searcher",
        "StoreShardActor": "store-shard",
    }
    address = ray.get_runtime_context().gcs_address  # other Rays may run on this machine
    alive = list_actors(address=address, filters=[("state", "=", "ALIVE")], limit=1000, detail=True)
    return {actor.pid: kinds.get(actor.class_name, "controller") for actor in alive}


def measure(
    searchers: int, servers: int, window_s: float, *, shared: bool = False
) -> dict[str, float]:
    """Steady-state figures of one size of fleet."""
    config = fleet_config(
        {"searchers": searchers, "servers": servers, "problems_per_searcher": PROBLEMS, "server": {"cpus": 0.1},
         "searcher": {"cpus": 0.01}}
    )  # fmt: skip
    work = _work(searchers, shared)
    namespace = f"sdt-benchmark-{secrets.token_hex(4)}"
    settings = {"max_new_tokens": HORIZON}
    controller = ControllerActor.options(num_cpus=0).remote(
        config, FakeModel, work, settings, namespace
    )
    try:
        ray.get(controller.start.remote())
        while True:
            status = ray.get(controller.next_report.remote([], 1.0)).status
            ready = all(slot["state"] == "ready" for slot in status["slots"].values())
            if ready and status["under_way"] == len(work):
                break
        pids = _pids()
        time.sleep(3.0)
        first = _read(config, namespace, pids)
        time.sleep(window_s)
        last = _read(config, namespace, pids)
    finally:
        ray.get(controller.stop.remote())
        ray.kill(controller)
    return _figures(first, last, min(servers, 2 * searchers))


def _figures(first: Reading, last: Reading, busy_servers: int) -> dict[str, float]:
    seconds = last.at - first.at
    rows = last.rows - first.rows
    batch = rows / (last.batches - first.batches)
    ideal = busy_servers * batch / (CALL_S + ROW_S * batch)
    figures = {
        "rows_s": rows / seconds,
        "share": rows / seconds / ideal,
        "rows_per_call": rows / (last.calls - first.calls),
        "rows_per_batch": batch,
    }
    return figures | {kind: 1e6 * (last.cpu_s[kind] - first.cpu_s[kind]) / rows for kind in KINDS}


def _row(label: str, figures: dict[str, float]) -> str:
    cells = [f"{figures['rows_s']:,.0f}", f"{100 * figures['share']:.0f}%"]
    cells += [f"{figures['rows_per_call']:.0f}", f"{figures['rows_per_batch']:.0f}"]
    return (
        f"| {label} | " + " | ".join([*cells, *(f"{figures[kind]:.0f}" for kind in KINDS)]) + " |"
    )


def extrapolate(figures: dict[str, float], searchers: int, gpus: int) -> list[str]:
    """Rows of a table: what each kind of actor could do alone, in rows a second, if one core serves each actor."""
    per_server = figures["rows_per_batch"] / (CALL_S + ROW_S * figures["rows_per_batch"])
    limits = {
        f"{gpus} model servers, the model itself": gpus * per_server,
        f"{gpus} model servers, their own CPU": gpus * 1e6 / figures["model-server"],
        f"{searchers} searchers": searchers * 1e6 / figures["searcher"],
        "16 store shards": 16e6 / figures["store-shard"] if figures["store-shard"] else np.inf,
        "1 controller": 1e6 / figures["controller"] if figures["controller"] else np.inf,
    }
    rows = [f"| {name} | {limit:,.0f} |" for name, limit in limits.items()]
    first = min(limits, key=lambda name: limits[name])
    return [*rows, f"\nThe first limit is: {first}."]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--window", type=float, default=10.0)
    parser.add_argument("--sizes", default="1x1,2x1,4x1,4x2,8x4,16x8,32x8")
    arguments = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=True,
        namespace="sdt-benchmark",
        log_to_driver=False,
    )
    head = [
        "searchers x servers",
        "rows/s",
        "of ideal",
        "rows/call",
        "rows/batch",
        *(f"{k} CPU us/leaf" for k in KINDS),
    ]
    print("| " + " | ".join(head) + " |\n|---|" + "---:|" * (len(head) - 1))
    for size in arguments.sizes.split(","):
        searchers, servers = map(int, size.split("x"))
        print(_row(size, measure(searchers, servers, arguments.window)), flush=True)
    shared = measure(4, 2, arguments.window, shared=True)
    print(_row("4x2, four searchers a problem", shared), flush=True)
    print("\n| 1,000 searchers, 100 GPUs: what each could do | rows/s |\n|---|---:|")
    print("\n".join(extrapolate(shared, 1000, 100)))
    ray.shutdown()


if __name__ == "__main__":
    main()
