"""The fleet's Grafana dashboard, made from the table of exported metrics and put beside Ray's own.

Ray writes its dashboards under its session's folder, where a Grafana that was set up for Ray looks for more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdt_dist.actors.metrics import METRICS, Metric, metric_name
from sdt_dist.files import write_text

FILE = "sdt_fleet_grafana_dashboard.json"
_RATES = {
    "Rows per batch": "rate(ray_sdt_model_server_rows_total[1m]) / rate(ray_sdt_model_server_batches_total[1m])",
    "Cache hit rate": "1 - rate(ray_sdt_model_server_nfe_total[1m]) / rate(ray_sdt_model_server_distributions_total[1m])",
    "Prefix reuse (share of tokens)": "rate(ray_sdt_model_server_reused_tokens_total[1m])"
    " / rate(ray_sdt_model_server_prefix_tokens_total[1m])",
    "Model busy (share of time)": "rate(ray_sdt_model_server_busy_s_total[1m])",
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it: derived rates first, then every metric of every kind of actor."""
    panels = [(title, query, "{{place}}") for title, query in _RATES.items()]
    panels += [
        (f"{kind.replace('_', ' ')}: {metric.field}", _query(kind, metric), "{{place}}")
        for kind, metrics in METRICS.items()
        for metric in metrics
    ]
    return {
        "uid": "sdtFleet",
        "title": "sdt fleet",
        "tags": ["sdt", "ray"],
        "timezone": "browser",
        "schemaVersion": 38,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(number, *panel) for number, panel in enumerate(panels)],
    }


def write_dashboard(folder: Path) -> Path:
    """Write the dashboard's JSON into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    write_text(path, json.dumps(dashboard(), indent=1))
    return path


def place_dashboard() -> Path | None:
    """Put the dashboard where Ray keeps its own, on the machine whose session this process is in; None without one."""
    from ray._private.worker import global_worker

    node = global_worker.node
    folder = (
        None
        if node is None
        else Path(node.get_session_dir_path()) / "metrics" / "grafana" / "dashboards"
    )
    return write_dashboard(folder) if folder is not None and folder.is_dir() else None


def _query(kind: str, metric: Metric) -> str:
    name = f"ray_{metric_name(kind, metric)}"
    return f"rate({name}_total[1m])" if metric.type == "counter" else name


def _panel(number: int, title: str, query: str, legend: str) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
        "targets": [{"expr": query, "legendFormat": legend, "refId": "A", "datasource": source}],
    }
