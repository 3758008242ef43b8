"""Wall time of an evaluation in Ray local mode over that of the same evaluation in one process, start-up apart.

    SDT_DATA_DIR=... python -m benchmarks.local_mode [--num-problems 28] [--methods snis,dts,residual_ts]

ETTh1 as in examples/etth1_alignment.yaml with the bundled forecaster. In one process the clock starts when the model is
loaded; in local mode when the first search is handed out. Both write their results to disk. Prints Markdown, and whether
every sample is the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from sdt_dist.actors.config import FleetConfig, fleet_config
from sdt_dist.actors.evaluation import OnFleet
from sdt_dist.evaluation.directory import RunDirectory
from sdt_dist.evaluation.executor import InProcess
from sdt_dist.evaluation.plan import Plan, load_config, make_plan
from sdt_dist.evaluation.results import read_lines
from sdt_dist.evaluation.runner import run_evaluation
from sdt_dist.models.loading import load_model

_NOT_COMPARED = ("wall_s", "model_calls")


def one_process(plan: Plan, output: Path) -> float:
    """Seconds of the run in this process."""
    model = load_model(plan.config.model)
    begin = time.monotonic()
    run_evaluation(plan, RunDirectory(output, plan), executor=InProcess(lambda _: model))
    return time.monotonic() - begin


def local_mode(plan: Plan, output: Path, fleet: FleetConfig) -> float:
    """Seconds of the run on a fleet of this machine's Ray, from the first search handed out."""
    began: list[float] = []

    def watch(status: dict[str, Any]) -> None:
        if not began and status["under_way"]:
            began.append(time.monotonic())

    run_evaluation(plan, RunDirectory(output, plan), executor=OnFleet(fleet, watch=watch))
    return time.monotonic() - began[0]


def samples(directory: Path) -> list[dict[str, Any]]:
    """A run's lines without what may differ between runs."""
    return [
        {k: v for k, v in line.items() if k not in _NOT_COMPARED} for line in read_lines(directory)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-problems", type=int, default=28)
    parser.add_argument("--methods", default="snis,dts,residual_ts")
    parser.add_argument(
        "--fleets", default="[{}]", help="JSON list of FleetConfig fields, one row each"
    )
    arguments = parser.parse_args()
    changes = {"num_problems": arguments.num_problems, "methods": arguments.methods.split(",")}
    plan = make_plan(load_config("examples/etth1_alignment.yaml", changes))
    print("| where | seconds | over one process | same samples |\n|---|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = one_process(plan, Path(folder) / "one")
        print(f"| one process | {base:.0f} | 1.00 | |", flush=True)
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=True,
            namespace="sdt-benchmark",
            log_to_driver=False,
        )
        for place, fields in enumerate(json.loads(arguments.fleets)):
            output = Path(folder) / f"fleet{place}"
            seconds = local_mode(plan, output, fleet_config(fields))
            same = "yes" if samples(output) == samples(Path(folder) / "one") else "NO"
            print(
                f"| local mode {fields or ''} | {seconds:.0f} | {seconds / base:.2f} | {same} |",
                flush=True,
            )
        ray.shutdown()


if __name__ == "__main__":
    main()
