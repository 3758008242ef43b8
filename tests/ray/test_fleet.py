"""The fleet on real Ray gives what one process gives, and ends cleanly whatever ends it.

See docs/architecture/fleet.md.
"""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sdt_dist.actors.config import fleet_config
from sdt_dist.actors.evaluation import OnFleet
from sdt_dist.actors.fleet import run_fleet
from sdt_dist.actors.work import SpecReward
from sdt_dist.errors import CheckpointError, FleetError
from sdt_dist.evaluation.executor import InProcess
from sdt_dist.models.card import card_of
from sdt_dist.models.loading import load_model
from sdt_dist.models.toy import Toy
from sdt_dist.search.methods import method_names
from tests.evaluation_helpers import evaluate_into
from tests.fleet_helpers import TOY, alone, same, toy_work
from tests.flow_helpers import save_small_flow
from tests.ray_helpers import actor_processes, run_all, wait_for_deaths, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

METHODS = {
    name: {"num_samples": 4} | ({} if name in ("greedy", "sample") else {"num_rollouts": 40})
    for name in method_names()
}
FEW = {"residual_ts": METHODS["residual_ts"]}
SETTINGS = {
    "num_problems": 3,
    "horizon": 8,
    "context_length": 64,
    "num_rollouts": 8,
    "num_samples": 6,
    "wave_size": 4,
}
_load = partial(Toy, *TOY)


@pytest.mark.parametrize(
    ("searchers", "servers"), [(1, 1), (4, 2)]
)  # further sizes: tests/unit/test_fleet_plain.py
def test_a_fleet_gives_the_samples_of_one_process(searchers, servers):
    work = toy_work(_load(), METHODS, 3)
    outcomes = run_all(work, _load, searchers=searchers, servers=servers)
    assert outcomes.keys() == {w.name for w in work}
    for w in work:
        want = alone(_load(), w)
        assert same(outcomes[w.name], want), w.name
        assert outcomes[w.name].nfe == want.nfe, w.name


def _lines(folder: Path, settings: dict, executor) -> dict[tuple[int, str], dict]:
    """The run's lines without what time and the merging of calls decide; a pair that occurs twice fails."""
    evaluate_into(folder, settings, executor=executor)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = {(line["problem"], line["label"]): line for line in lines}
    assert len(found) == len(lines)
    return {
        pair: {k: v for k, v in line.items() if k not in ("wall_s", "model_calls")}
        for pair, line in found.items()
    }


@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_of_the_bundled_forecaster_writes_the_same_lines_and_searchers_need_no_torch(
    tmp_path,
):
    maps: dict[str, str] = {}

    def look(status):
        if status["done"]:
            for name, pid in actor_processes().items():
                maps[name] = Path(f"/proc/{pid}/maps").read_text()

    fleet = fleet_config({"searchers": 2, "servers": 1})
    methods = [*method_names(), {"name": "snis", "label": "by its own reward", "reward": "nonneg"}]
    have = _lines(tmp_path / "fleet", SETTINGS | {"methods": methods}, OnFleet(fleet, watch=look))
    want = _lines(tmp_path / "here", SETTINGS | {"methods": methods}, InProcess())
    assert have == want and len(want) == 3 * len(methods)
    assert {name: "libtorch" in text for name, text in maps.items() if name != "controller"} == {
        "model-server-0": True,
        "searcher-0": False,
        "searcher-1": False,
    }


@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_with_a_flow_writes_the_same_lines_and_searchers_need_no_torch_for_it(
    tmp_path,
):
    save_small_flow(tmp_path / "flow", card_of(load_model("bundled")), 8)
    settings = SETTINGS | {
        "methods": ["s_adt", "snis+flow", "snis"],
        "flow": str(tmp_path / "flow"),
    }
    maps: dict[str, str] = {}

    def look(status):
        if status["done"]:
            for name, pid in actor_processes().items():
                maps[name] = Path(f"/proc/{pid}/maps").read_text()

    have = _lines(tmp_path / "fleet", settings, OnFleet(fleet_config({}), watch=look))
    want = _lines(tmp_path / "here", settings, InProcess())
    assert have == want and len(want) == 9 and {line["status"] for line in want.values()} == {"ok"}
    assert len({line["flow"] for pair, line in want.items() if pair[1] != "snis"}) == 1
    assert "libtorch" not in maps["searcher-0"] and "libtorch" in maps["model-server-0"]


def test_a_flow_of_another_model_is_refused_by_its_own_error(tmp_path):
    other = save_small_flow(tmp_path / "flow", card_of(Toy(5, 4, 2.0)), 4, reward="toy")
    work = [replace(one, method="s_adt", flow=other.identity) for one in toy_work(_load(), FEW, 1)]
    with pytest.raises(CheckpointError, match="flow: trained for model"):
        list(run_fleet(work, fleet_config({}), _load, max_new_tokens=4, flows=[other]))


def test_a_reward_in_a_file_of_the_driver_reaches_the_workers(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "def score(samples):\n    return [float(sum(tokens)) / 20 for tokens in samples]\n"
    )
    reward = SpecReward.of(f"{file}:score")
    file.unlink()
    (work,) = toy_work(_load(), FEW, 1)
    outcome = run_all([replace(work, reward=reward)], _load)[work.name]
    assert all(sample.reward == sum(sample.tokens) / 20 for sample in outcome.finished)


def test_a_reward_that_fails_on_one_problem_is_one_failed_line_and_the_others_go_on(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "def score(series, context):\n"
        "    if context.history.mean() > 300:\n"
        "        raise KeyError('no such thing')\n"
        "    return -series.std(axis=1)\n"
    )
    settings = SETTINGS | {"methods": ["sample", "residual_ts"], "reward": f"{file}:score"}
    have = _lines(tmp_path / "fleet", settings, OnFleet(fleet_config({})))
    assert have == _lines(tmp_path / "here", settings, InProcess())
    failed = {pair: line["error"] for pair, line in have.items() if line["status"] == "failed"}
    assert failed.keys() == {(0, "sample"), (0, "residual_ts")} and len(have) == 6
    assert all("no such thing" in error for error in failed.values())


def _broken() -> Toy:
    raise FileNotFoundError("no weights at this path")


def test_a_model_that_never_loads_ends_the_run_and_says_why():
    begin = time.monotonic()
    with pytest.raises(
        FleetError,
        match=r"no model-server can be started; model-server-0: .*no weights at this path",
    ):
        run_all(toy_work(_load(), FEW, 2), _broken)
    assert time.monotonic() - begin < 60
    wait_for_deaths([])


@pytest.mark.parametrize("end", ["to the end", "closed", "interrupted"])
def test_no_actor_outlives_its_run(end):
    runs = run_fleet(
        toy_work(_load(), FEW, 6),
        fleet_config({"searchers": 2, "problems_per_searcher": 1}),
        _load,
        max_new_tokens=4,
    )
    next(runs)
    everyone = {"controller", "model-server-0", "searcher-0", "searcher-1"}
    wait_until(lambda: actor_processes().keys() == everyone, 30, "the second searcher")
    actors = actor_processes()
    if end == "to the end":
        assert len(list(runs)) == 5
    elif end == "closed":
        runs.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            runs.throw(KeyboardInterrupt())
    wait_for_deaths(actors.values())


def test_a_worker_refuses_bare_names_as_this_process_does():
    import ray

    @ray.remote(num_cpus=0)
    def bare() -> str:
        try:
            importlib.import_module("actors")
        except ImportError as error:
            return str(error)
        return "imported"

    assert "import sdt_dist.actors" in ray.get(bare.remote())
