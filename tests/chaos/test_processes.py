"""Whole nodes, the driver, and the network: each run is complete, nothing twice, every sample as without.

See docs/architecture/fleet.md.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from tests.chaos.killing import Recovery
from tests.evaluation_helpers import evaluate_into
from tests.ray_helpers import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(400)]

SETTINGS = {
    "num_problems": 6,
    "horizon": 8,
    "context_length": 64,
    "num_rollouts": 16,
    "num_samples": 6,
    "wave_size": 4,
}
KILLS = 5
NODE_KILLS = 3


def _python(module: str, *arguments: object) -> dict:
    """What a module printed as its last line, as JSON."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_losing_a_node_with_a_server_and_a_searcher_loses_nothing(tmp_path, table):
    found = _python("tests.chaos.nodes", tmp_path, NODE_KILLS)
    table.append(
        Recovery("node", found["replaced_s"], found["result_s"], found["wall_s"], found["notes"])
    )
    assert found["held"] == [["ModelServerActor", "SearcherActor"]] * NODE_KILLS
    assert len(found["replaced_s"]) == NODE_KILLS and not found["error"]
    assert found["complete"] and found["different"] == []


def test_lost_requests_and_replies_change_nothing_and_are_paid_once(table):
    found = _python("tests.chaos.rpc")
    lost = found["lost"] / found["calls"]
    notes = f"{lost:.0%} of {found['calls']} plain calls were lost; {found['deaths']} deaths"
    table.append(Recovery("requests and replies", [], [], found["wall_s"], notes))
    assert 0.3 < lost < 0.6, "1 - 0.75 ** 2 is what was asked for"
    assert found["arrived"] > found["answered"], "replies were lost as well as requests"
    assert found["complete"] and found["different"] == []
    assert found["restarted"] > 0 or found["nfe"][0] == found["nfe"][1]


@pytest.fixture
def undisturbed(tmp_path, one_thread) -> dict[tuple[int, str], dict]:
    """The lines that the run must have in the end, made in one process."""
    evaluate_into(tmp_path / "undisturbed", SETTINGS)
    return _lines(tmp_path / "undisturbed")


def _lines(folder: Path) -> dict[tuple[int, str], dict]:
    """Whole lines without what time and the merging of calls decide; a pair that occurs twice fails."""
    file = folder / "samples.jsonl"
    content = file.read_bytes() if file.exists() else b""
    lines = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    found = {(line["problem"], line["label"]): line for line in lines}
    assert len(found) == len(lines), "a line came twice"
    return {
        pair: {k: v for k, v in line.items() if k not in ("wall_s", "model_calls")}
        for pair, line in found.items()
    }


def _has_more(folder: Path, lines: int) -> bool:
    return len(_lines(folder)) > lines


def _start(folder: Path) -> subprocess.Popen:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    fleet = ["--searchers", "2", "--servers", "2"]
    command = [
        sys.executable,
        "-m",
        "sdt_dist.cluster.cli",
        "evaluate",
        str(config),
        *fleet,
        "--resume",
    ]
    return subprocess.Popen(
        [*command, "--output", str(folder / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _has_ended(process: psutil.Process) -> bool:
    """Gone, or dead and only not yet reaped by whoever inherited it.

    Ray's own agents do not count: they notice within a minute or so that their raylet is dead.
    """
    try:
        is_agent = any(
            part.endswith(("Agent", "agent.py", "agent/main.py")) for part in process.cmdline()[:4]
        )
        return is_agent or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill(driver: subprocess.Popen, how: signal.Signals) -> str:
    """Kill it, Ctrl-C as a terminal does (the whole group); what it said, once nothing of it is left."""
    started = psutil.Process(driver.pid).children(recursive=True)
    if how == signal.SIGINT:
        os.killpg(driver.pid, signal.SIGINT)
    else:
        driver.kill()
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), said[-2000:]
    try:
        wait_until(lambda: all(map(_has_ended, started)), 60, "its processes to end")
    except AssertionError as error:
        raise AssertionError([p.cmdline() for p in started if not _has_ended(p)]) from error
    return said


def test_a_driver_killed_again_and_again_goes_on_with_resume(tmp_path, undisturbed, table):
    rng = random.Random(5)
    begin = time.monotonic()
    run = tmp_path / "run"
    recovery = Recovery(
        "driver (sdt evaluate)",
        notes="next result: from the kill to new lines, Ray's start included",
    )
    for number in range(KILLS):
        before = _lines(run)
        killed_at = time.monotonic()
        driver = _start(tmp_path)
        if number == 0:
            time.sleep(rng.uniform(0.5, 6.0))  # the first dies while it starts
        else:
            wait_until(partial(_has_more, run, len(before)), 120, "new lines")
            recovery.result_s.append(time.monotonic() - killed_at)
            time.sleep(rng.uniform(0.0, 0.5))
        how = signal.SIGINT if number == KILLS - 1 else signal.SIGKILL
        said = _kill(driver, how)
        assert how != signal.SIGINT or ("sdt: stopped" in said and "Traceback" not in said), said
        kept = _lines(run)
        assert all(kept[pair] == line for pair, line in before.items())
        assert len(kept) < len(undisturbed), "the run was over before it was killed"
    driver = _start(tmp_path)
    _, said = driver.communicate(timeout=200)
    recovery.wall_s = time.monotonic() - begin
    table.append(recovery)
    assert driver.returncode == 0, said[-2000:]
    assert _lines(run) == undisturbed
