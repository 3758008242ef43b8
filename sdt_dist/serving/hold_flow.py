"""Letting a model propose with a flow, wherever the model runs."""

from __future__ import annotations

from typing import Any

from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.process import check_holds_flows


def hold_flow(model: Any, files: FlowFiles) -> None:
    """Let a model propose with the flow of these files, or make sure that the server behind it does.

    ConfigurationError where it cannot hold flows, CheckpointError for damaged files.
    """
    check_held = getattr(model, "check_flow", None)
    if check_held is not None:
        check_held(files.identity)
        return
    from sdt_dist.flow.flow import Flow  # here, as it loads torch

    check_holds_flows(model).load_flow(Flow.of(files))
