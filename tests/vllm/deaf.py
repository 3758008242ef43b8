"""A logits processor that connects and then does nothing."""

from __future__ import annotations

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

from sdt_dist.models.vllm.channel import connect
from sdt_dist.models.vllm.processor import CHANNEL


class Deaf(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory) -> None:
        self._channel = connect(vllm_config.additional_config[CHANNEL])

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits
