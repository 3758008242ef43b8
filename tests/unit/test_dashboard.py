"""Exported metrics exist in the counters they come from, and the dashboard asks only for metrics that exist."""

from __future__ import annotations

import json
import re

from sdt_dist.actors.config import fleet_config
from sdt_dist.actors.controller.controller import Controller
from sdt_dist.actors.learner import LearningPlan, LiveLearner
from sdt_dist.actors.metrics import METRICS, metric_name
from sdt_dist.actors.searcher import Searcher
from sdt_dist.actors.store_shard import StoreShard
from sdt_dist.actors.trajectory_buffer import TrajectoryBuffer
from sdt_dist.cluster.dashboard import dashboard, write_dashboard
from sdt_dist.models.toy import Toy
from sdt_dist.training.flow.config import TrainFlowConfig
from tests.fleet_helpers import PlainBackend, ServerTarget


def _statuses(tmp_path) -> dict[str, dict]:
    load = lambda: Toy(3, 3, 1.0)  # noqa: E731
    controller = Controller(fleet_config({}), PlainBackend(load), [], max_new_tokens=3)
    return {
        "model_server": ServerTarget(load(), "model-server-0").server.status(),
        "searcher": Searcher("searcher-0").status(),
        "store_shard": StoreShard("store-shard-0", tmp_path / "shard.npz").status(),
        "trajectory_buffer": TrajectoryBuffer("trajectory-buffer-0", 4).status(),
        "learner": LiveLearner("learner-0", LearningPlan(TrainFlowConfig(), tmp_path, "")).status(),
        "controller": controller.status(),
    }


def test_every_metric_is_a_number_that_its_actor_reports(tmp_path):
    statuses = _statuses(tmp_path)
    assert statuses.keys() == METRICS.keys()
    for kind, metrics in METRICS.items():
        for metric in metrics:
            assert isinstance(statuses[kind][metric.field], (int, float)), (kind, metric.field)


def test_the_dashboard_asks_for_metrics_that_exist_and_for_all_of_them(tmp_path):
    path = write_dashboard(tmp_path / "dashboards")
    panels = json.loads(path.read_text())["panels"]
    asked = {
        name
        for panel in panels
        for t in panel["targets"]
        for name in re.findall(r"ray_(sdt_\w+)", t["expr"])
    }
    known = {
        metric_name(kind, m) + ("_total" if m.type == "counter" else "")
        for kind, own in METRICS.items()
        for m in own
    }
    assert asked == known
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"].values()) for panel in panels]
    assert len(set(places)) == len(places) and dashboard()["uid"] == "sdtFleet"
