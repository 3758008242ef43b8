"""`--flow` of the commands that search in this process: everything about a flow that can be refused, as early as it can be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdt_dist.flow.files import FlowFiles
    from sdt_dist.protocols import Flow


def read_flow(
    path: Path | None,
    method: str,
    model: str,
    reward: str,
    inverse_temperature: float,
    max_new_tokens: int,
) -> FlowFiles | None:
    """The checkpoint, if one was given; SdtError unless method, backend, reward, lambda and length go with it."""
    from sdt_dist.flow.files import FlowFiles
    from sdt_dist.models.spec import check_flow_backend
    from sdt_dist.search.methods import get_method

    get_method(method).check_flow(path is not None)
    if path is None:
        return None
    check_flow_backend(model)
    files = FlowFiles.read(path)
    files.head.check_use(reward, inverse_temperature, max_new_tokens)
    return files


def flow_of(files: FlowFiles | None, loaded: Any) -> Flow | None:
    """F itself for a loaded model; CheckpointError where it was trained for another one."""
    from sdt_dist.flow.flow import Flow as LearntFlow
    from sdt_dist.models.card import card_of

    if files is None:
        return None
    files.check_model(card_of(loaded))
    return LearntFlow.of(files)
