"""A fleet whose calls get lost, a quarter of the requests and of the replies; run as a process of its own.

`python -m tests.chaos.rpc` prints one JSON line. Ray reads the failures from the environment when its processes start.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial

_LOST = {
    "num_failures": -1,
    "req_failure_prob": 25,
    "resp_failure_prob": 25,
    "in_flight_failure_prob": 0,
}
_FAILURES = {"CoreWorkerService.grpc_client.PushTask": _LOST}
os.environ["RAY_testing_rpc_failure"] = json.dumps(_FAILURES)  # noqa: SIM112

import ray  # noqa: E402
from ray.exceptions import ActorUnavailableError  # noqa: E402

from sdt_dist.models.toy import Toy  # noqa: E402
from tests.fleet_helpers import TOY, alone, same, toy_work  # noqa: E402
from tests.ray_helpers import run_all  # noqa: E402

CALLS = 200


@ray.remote(
    max_restarts=0, max_task_retries=0, max_concurrency=CALLS, allow_out_of_order_execution=True
)
class Counter:
    """Counts the calls that arrived."""

    def __init__(self) -> None:
        self.count = 0

    async def add(self) -> int:
        self.count += 1
        return self.count


def _lost_calls() -> dict[str, int]:
    """Of `CALLS` calls: how many raised ActorUnavailableError, and how many arrived all the same."""
    counter = Counter.remote()
    answered = []
    lost = 0
    for reply in [counter.add.remote() for _ in range(CALLS)]:
        try:
            answered.append(ray.get(reply, timeout=60))
        except ActorUnavailableError:
            lost += 1
    ray.kill(counter)
    return {"calls": CALLS, "lost": lost, "arrived": max(answered), "answered": len(answered)}


def main() -> None:
    ray.init(
        address="local",
        namespace="chaos",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    found: dict = _lost_calls()
    work = toy_work(
        Toy(*TOY),
        {name: {"num_samples": 4, "num_rollouts": 40} for name in ("residual_ts", "dts")},
        12,
    )
    statuses: list[dict] = []
    begin = time.monotonic()
    outcomes = run_all(
        work, partial(Toy, *TOY), watch=statuses.append, searchers=2, max_attempts=20
    )
    found["wall_s"] = time.monotonic() - begin
    found["deaths"], found["restarted"] = statuses[-1]["deaths"], statuses[-1]["restarted_searches"]
    found["complete"] = outcomes.keys() == {w.name for w in work}
    wanted = {w.name: alone(Toy(*TOY), w) for w in work}
    found["different"] = [
        name for name, outcome in outcomes.items() if not same(outcome, wanted[name])
    ]
    found["nfe"] = [sum(outcome.nfe for outcome in runs.values()) for runs in (outcomes, wanted)]
    ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
