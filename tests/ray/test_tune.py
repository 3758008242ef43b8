"""A sweep on real Ray: one fleet for all trials, nothing repeated after a kill, a clear end where the fleet dies.

See docs/guides/sweeps.md.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from sdt_dist.actors.config import fleet_config
from sdt_dist.errors import FleetError, ResultsError
from sdt_dist.models.loading import load_model
from sdt_dist.tune.config import load_sweep, problems_of
from sdt_dist.tune.ledger import read_trials
from sdt_dist.tune.report import write_report
from sdt_dist.tune.sweep import run_sweep
from tests.ray_helpers import wait_for_deaths, wait_until
from tests.report_helpers import Page, check_cell, column_of, interval_of, measures_of, true_spectra

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("default"),
]

TRIALS = 8
RUNGS = [3, 6]
PROBLEMS = 2
SWEEP = {
    "evaluation": {
        "dataset": "co2",
        "num_problems": PROBLEMS,
        "horizon": 8,
        "context_length": 64,
        "num_samples": 6,
    },
    "methods": ["snis", "residual_ts"],
    "space": {
        "inverse_temperature": {"low": 1, "high": 30, "log": True},
        "epsilon": {"low": 0.1, "high": 0.5},
    },
    "rungs": RUNGS,
    "scheduler": "none",
    "num_trials": TRIALS,
}


def load_counted(log: Path) -> Any:
    """The bundled model; says in `log` that it was loaded."""
    with log.open("a") as handle:
        handle.write(f"{os.getpid()}\n")
    return load_model("bundled")


def drive(output: str, log: str, address: str) -> None:
    """A driver of its own, to be killed."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    sweep = load_sweep(None, SWEEP)
    run_sweep(
        sweep,
        problems_of(sweep),
        Path(output),
        fleet_config({}),
        loader=partial(load_counted, Path(log)),
    )


def _lines(output: Path) -> dict[str, bytes]:
    """Every evaluation's lines on disk, torn ones left out."""
    files = sorted((output / "trials").glob("*/*/samples.jsonl"))
    return {
        str(path.relative_to(output)): path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
        for path in files
    }


def _killed_sweep(output: Path, log: Path) -> None:
    """A sweep whose driver was killed once two of its trials had ended."""
    address = ray.get_runtime_context().gcs_address
    code = (
        f"from tests.ray.test_tune import drive; drive({str(output)!r}, {str(log)!r}, {address!r})"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"RAY_AUTH_MODE": "token"}
    )
    try:
        wait_until(
            lambda: len(read_trials(output)) >= 2 or driver.poll() is not None, 400, "two trials"
        )
        assert driver.poll() is None, "the driver ended before it was killed"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    wait_for_deaths([])


def _trial_processes() -> dict[int, str]:
    """{pid: what it has mapped} of every living trial, which Tune calls ImplicitFunc."""
    found = {}
    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE" and "ImplicitFunc" in actor["ActorClassName"]:
            try:
                found[actor["Pid"]] = Path(f"/proc/{actor['Pid']}/maps").read_text()
            except OSError:
                continue  # it has ended meanwhile
    return found


def _check_page(output: Path, lines: list[Any]) -> None:
    """The trials' numbers on the page, and in the ledger, are those of their samples."""
    cells = Page((output / "sweep.html").read_text()).of("trials")
    for line in lines:
        (rows,) = measures_of(output / "trials" / line.trial / str(line.rollouts)).values()
        for metric in ("crps", "nfe"):
            values = column_of(rows, metric)
            assert line.objectives[metric]["mean"] == pytest.approx(values.mean(), rel=1e-9)
            check_cell(cells["", line.trial, metric], values.mean(), *interval_of(values))
        place = output / "trials" / line.trial / str(line.rollouts)
        signed = column_of(rows, "spec_w1") - np.array(
            [true_spectra(place)[index]["spec_w1"] for index in rows]
        )
        low, high = interval_of(signed)
        low, high = (
            (0.0 if low <= 0 <= high else min(abs(low), abs(high))),
            max(abs(low), abs(high)),
        )
        check_cell(cells["", line.trial, "spec_w1_gap"], abs(signed.mean()), low, high)


@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on_with_one_model_for_all_trials_and_repeats_no_search(tmp_path):
    output = tmp_path / "sweep"
    _killed_sweep(output, tmp_path / "first")
    ended = read_trials(output)
    before = _lines(output)
    lines_before = sum(text.count(b"\n") for text in before.values())
    assert 2 <= len(ended) < TRIALS and lines_before >= 2 * len(RUNGS) * PROBLEMS
    seen: dict[int, str] = {}
    last: dict[str, Any] = {}

    def watch(status: dict[str, Any]) -> None:
        last.update(status)
        seen.update(_trial_processes())

    sweep = load_sweep(None, SWEEP)
    problems = problems_of(sweep)
    with pytest.raises(ResultsError, match="add --resume"):
        run_sweep(sweep, problems, output, fleet_config({}))
    loader = partial(load_counted, tmp_path / "second")
    lines = run_sweep(
        sweep, problems, output, fleet_config({}), resume=True, watch=watch, loader=loader
    )
    assert len({line.trial for line in lines}) == TRIALS and {line.status for line in lines} == {
        "finished"
    }
    after = _lines(output)
    assert all(after[name].startswith(text) for name, text in before.items())
    assert sum(text.count(b"\n") for text in after.values()) == TRIALS * len(RUNGS) * PROBLEMS
    assert last["total"] == TRIALS * len(RUNGS) * PROBLEMS - lines_before, (
        "searches that were on disk were made again"
    )
    assert {line.trial: line.rungs for line in ended}.items() <= {
        line.trial: line.rungs for line in lines
    }.items()
    assert [len((tmp_path / log).read_text().split()) for log in ("first", "second")] == [1, 1]
    served = {Path(name).parts[1] for name, text in after.items() if text != before.get(name)}
    assert len(served) >= 4, "four trials or more on the second fleet, whose model was loaded once"
    assert seen and not any("libtorch" in maps for maps in seen.values())
    found = write_report(output, sweep, problems)
    assert found.best in lines and (output / "best.yaml").exists() and len(found.figures) >= 2
    _check_page(output, lines)
    assert all(
        json.loads(line)["nfe"] > 0 for line in (output / "trials.jsonl").read_text().splitlines()
    )


def test_a_sweep_whose_fleet_cannot_start_ends_with_the_fleets_own_error(tmp_path):
    sweep = load_sweep(None, SWEEP | {"num_trials": 2, "max_concurrent": 1})
    hasty = fleet_config({"start_timeout_s": 0.2})
    with pytest.raises(FleetError, match=r"waited .* for the controller; run again with --resume"):
        run_sweep(sweep, problems_of(sweep), tmp_path / "sweep", hasty)
    wait_for_deaths([])
    gc.collect()  # here, where warnings are no errors: Tune leaves its logs open when it is interrupted
