"""`HFModel`: a LogitsModel over a Transformers causal language model.

See docs/architecture/search.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from sdt_dist.models.cached_model import CachedModel
from sdt_dist.models.hf.llama import LlamaDecoder
from sdt_dist.models.hf.module_decoder import ModuleDecoder


class HFModel(CachedModel):
    """The module behind a lean decoder where it is a plain Llama on the CPU, else driven as it is.

    `deterministic` is True on the CPU, where a row's bits do not depend on its batch.
    """

    def __init__(
        self, module: PreTrainedModel, *, max_context: int | None = None, cache_bytes: int = 2 << 30
    ) -> None:
        lean = isinstance(module, LlamaForCausalLM) and LlamaDecoder.supports(module)
        decoder = LlamaDecoder(module) if lean else ModuleDecoder(module)  # type: ignore[arg-type]
        self.module = module
        self.device = decoder.device
        super().__init__(
            decoder,
            vocab_size=int(module.config.vocab_size),
            max_context=int(max_context or module.config.max_position_embeddings),
            deterministic=self.device.type == "cpu",
            cache_bytes=cache_bytes,
        )

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """What ends a sequence by the model's own generation settings."""
        return getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)

    @torch.inference_mode()
    def reference_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [V] float32 after a sequence, by the module itself and without caches."""
        ids = torch.tensor([list(tokens)], device=self.device)
        return self.module(input_ids=ids).logits[0, -1].float().cpu().numpy()

    def config_values(self) -> dict[str, Any]:
        """The configuration where it differs from its defaults."""
        return self.module.config.to_diff_dict()

    def named_weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Label and bytes [n] uint8 of every weight, in order (numpy has no bfloat16)."""
        for label, tensor in sorted(self.module.state_dict().items()):
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield f"{label}:{tensor.dtype}:{tuple(tensor.shape)}", data
