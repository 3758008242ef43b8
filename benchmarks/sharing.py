"""Four searchers on one problem against one: total variation to pi* and wall time where a model call takes 20 ms.

    python -m benchmarks.sharing [--problems 3]

Toy C of docs/concepts/exactness.md#toys on real Ray actors, one model server. One searcher has 3,000 rollouts at wave sizes up to 32; four
share 3,000 to 3,600 (a fifth more at most). Prints Markdown: wave size, TV of the finished search, seconds from the
start of the first search to the last result, one problem after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import ray

from sdt_dist.actors.config import FleetConfig, fleet_config
from sdt_dist.actors.fleet import run_fleet
from sdt_dist.actors.work import GivenReward, Work
from sdt_dist.models.toy import Toy
from sdt_dist.parts import TokensPart
from sdt_dist.protocols import PriorLaw, Rollout, RolloutRequest
from sdt_dist.search.result import SearchResult
from sdt_dist.search.sharing_plan import SharingPlan, merge_members

TOY = (5, 6, 1.0, "smooth", 20.0, 0)
CALL_S = 0.02


class SlowToy(Toy):
    """Toy C, each of whose rollout calls takes 20 ms longer."""

    def __init__(self) -> None:
        super().__init__(*TOY)  # type: ignore[arg-type]

    def rollout(self, requests: Sequence[RolloutRequest], law: PriorLaw) -> list[Rollout]:
        time.sleep(CALL_S)
        return super().rollout(requests, law)


def searches(problem: int, searchers: int, num_rollouts: int, wave_size: int) -> list[Work]:
    """The searches of one problem: one, or a team with one budget."""
    options = {"inverse_temperature": 20.0, "num_rollouts": num_rollouts, "wave_size": wave_size}
    work = Work(
        f"{problem}", problem, (TokensPart((0,)),), GivenReward(Toy(*TOY)), "residual_ts", options
    )  # type: ignore[arg-type]
    members = SharingPlan(f"run{wave_size}", {problem: f"key{problem}"}, searchers).members(problem)
    return [
        work
        if member is None
        else replace(work, name=f"{problem}/{member.searcher}", membership=member)
        for member in members
    ]


def measure(
    config: FleetConfig, num_rollouts: int, wave_size: int, problem: int
) -> tuple[float, float]:
    """(TV, seconds) of one problem; seconds from when all of its searches are under way."""
    work = searches(problem, config.searchers, num_rollouts, wave_size)
    began = []

    def watch(status: dict) -> None:
        if not began and status["under_way"] == len(work):
            began.append(time.monotonic())

    outcomes = run_fleet(work, config, SlowToy, max_new_tokens=6, watch=watch)
    results = []
    ended = 0.0
    for _, outcome in outcomes:
        assert isinstance(outcome, SearchResult), outcome
        results.append(outcome)
        ended = time.monotonic()
    result = merge_members(results) if len(results) > 1 else results[0]
    toy = Toy(*TOY)  # type: ignore[arg-type]
    law = np.zeros(len(toy.target))
    for tokens, probability in result.distribution():
        law[toy.index(tokens)] += probability
    return float(0.5 * np.abs(law - toy.target).sum()), ended - began[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=3)
    arguments = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        namespace="sdt-benchmark",
        log_to_driver=False,
    )
    print("| searchers | rollouts | wave size | TV | seconds |\n|---:|---:|---:|---:|---:|")
    for searchers_, rollouts, waves in [
        (1, 3000, (4, 8, 16, 32)),
        (4, 3000, (32,)),
        (4, 3300, (32,)),
        (4, 3600, (8, 16, 32)),
    ]:
        config = fleet_config({"searchers": searchers_})
        for wave_size in waves:
            found = np.array(
                [
                    measure(config, rollouts, wave_size, problem)
                    for problem in range(arguments.problems)
                ]
            )
            tv, seconds = found.mean(axis=0)
            print(
                f"| {searchers_} | {rollouts} | {wave_size} | {tv:.3f} | {seconds:.2f} |",
                flush=True,
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
