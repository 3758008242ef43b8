"""What the fleet exports to Prometheus through Ray, from the counters that its actors keep anyway.

See docs/architecture/fleet.md.

One table says what exists; the Grafana dashboard is made from the same table. Ray exports a Counter `x` as `ray_x_total`
and a Gauge as `ray_x`. The only tag is an actor's place in the fleet, so cardinality stays low.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdt_dist.extras import packages_of

with packages_of("cluster", "the fleet"):
    from ray.util.metrics import Counter, Gauge


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported number: the counter it comes from, its type and what it means."""

    field: str
    type: Literal["counter", "gauge"]
    description: str


METRICS: dict[str, list[Metric]] = {
    "model_server": [
        Metric("calls", "counter", "model calls of searchers answered"),
        Metric("batches", "counter", "batches that these were merged into"),
        Metric("rows", "counter", "requests (leaves and rollouts) answered"),
        Metric("tokens", "counter", "tokens generated in rollouts"),
        Metric("distributions", "counter", "next-token distributions asked for"),
        Metric("nfe", "counter", "next-token distributions computed; the others came from caches"),
        Metric("recomputed_tokens", "counter", "positions encoded again after an eviction"),
        Metric(
            "prefix_tokens",
            "counter",
            "positions before the distributions asked for: prompts and known tokens",
        ),
        Metric("reused_tokens", "counter", "those of them whose keys and values came from a cache"),
        Metric("busy_s", "counter", "seconds in which the model worked"),
        Metric("waiting_rows", "gauge", "rows that wait in the queue"),
        Metric("waiting_calls", "gauge", "calls that wait in the queue"),
    ],
    "searcher": [
        Metric("searches", "counter", "searches ended"),
        Metric("rounds", "counter", "rounds of its crews"),
        Metric("rollouts", "counter", "finished rollouts of ended searches"),
        Metric("nfe", "counter", "next-token distributions that ended searches paid for"),
        Metric("advance_s", "counter", "seconds of its own work in searches"),
        Metric("wait_s", "counter", "seconds its crews waited for models"),
        Metric("searches_under_way", "gauge", "searches it drives now; 0 is an idle searcher"),
        Metric("lost_records", "counter", "finished searches that no trajectory buffer took"),
    ],
    "store_shard": [
        Metric("walks", "gauge", "walks kept as evidence"),
        Metric("bytes", "gauge", "bytes of evidence"),
        Metric("exchanges", "counter", "exchanges answered"),
    ],
    "trajectory_buffer": [
        Metric(
            "held", "gauge", "finished searches held, until the learner has them in a saved state"
        ),
        Metric("waiting", "gauge", "those of them that it has not taken yet"),
        Metric("received", "counter", "finished searches that came"),
        Metric("repeated", "counter", "messages that came again"),
        Metric("dropped", "counter", "finished searches that went before the learner took them"),
    ],
    "learner": [
        Metric("step", "gauge", "gradient steps taken"),
        Metric("version", "gauge", "last published version of the flow"),
        Metric("loss", "gauge", "total loss of the last step, squared nats"),
        Metric("log_z", "gauge", "mean log Z of the last batch, nats"),
        Metric("staleness", "gauge", "mean age of the last batch, versions"),
        Metric("steps_per_s", "gauge", "gradient steps a second since it was started"),
        Metric("replay", "gauge", "trajectories in its replay buffer"),
        Metric("received", "gauge", "finished samples that came"),
        Metric("stale", "gauge", "those that went because they were too old"),
        Metric("unusable", "counter", "finished searches that could not be learnt from"),
        Metric("wait_s", "counter", "seconds in which it waited for searches and rows of p"),
    ],
    "controller": [
        Metric("done", "gauge", "searches done"),
        Metric("failed", "gauge", "searches that failed or were set aside"),
        Metric("under_way", "gauge", "searches handed out"),
        Metric("waiting", "gauge", "searches that wait for a searcher"),
        Metric("restarted_searches", "counter", "searches started again after a death"),
        Metric("deaths", "counter", "actors found dead"),
        Metric("ready_model_servers", "gauge", "model servers that answer"),
        Metric("ready_searchers", "gauge", "searchers that answer"),
        Metric("ready_store_shards", "gauge", "store shards that answer"),
        Metric("flow_version", "gauge", "version of the newest flow that all model servers hold"),
    ],
}


def metric_name(kind: str, metric: Metric) -> str:
    """The metric's name as given to Ray."""
    return f"sdt_{kind}_{metric.field}"


class Exporter:
    """Exports one actor's counters whenever it is shown them."""

    def __init__(self, kind: str, name: str) -> None:
        self._tags = {"place": name}
        self._metrics = [(m, _make(kind, m)) for m in METRICS[kind]]
        self._before: dict[str, float] = {}

    def export(self, counters: Mapping[str, Any]) -> None:
        """Gauges as they are, counters by what they grew since the last time."""
        for metric, exported in self._metrics:
            value = float(counters[metric.field])
            if isinstance(exported, Gauge):
                exported.set(value, tags=self._tags)
                continue
            grown = value - self._before.get(metric.field, 0.0)
            if grown > 0:
                exported.inc(grown, tags=self._tags)
            self._before[metric.field] = value


def _make(kind: str, metric: Metric) -> Counter | Gauge:
    make = Counter if metric.type == "counter" else Gauge
    return make(metric_name(kind, metric), description=metric.description, tag_keys=("place",))
