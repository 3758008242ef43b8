"""Loading models through vLLM: directories, hub ids and forecasters; safetensors only.

See docs/architecture/search.md.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sdt_dist.errors import ConfigurationError, FleetError, first_line
from sdt_dist.models.directory import check_weights, model_directory
from sdt_dist.models.forecaster import bundled
from sdt_dist.models.forecaster.process import Forecaster
from sdt_dist.models.hf.loading import load_tokenizer, quiet_transformers
from sdt_dist.models.language import LanguageModel
from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest, Root, prompt_digest

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # our process has threads, which a fork would lose
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second one has another interface for logits processors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on a CPU: the engine's process computes; it is a process of its own in any case
}
_NEEDED = "vllm: this needs vLLM 0.32 or a version that works like it"


def load_language_model(name: str, *, trust_remote_code: bool = False) -> LanguageModel:
    """A causal language model from a directory or hub id, with its tokenizer; errors as in `open_model`."""
    directory = model_directory(name)
    try:
        tokenizer = load_tokenizer(str(directory), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model: {name!r} cannot be loaded: {first_line(error)}"
        ) from error
    return LanguageModel(open_model(directory, trust_remote_code=trust_remote_code), tokenizer)


def load_forecaster(name: str) -> Forecaster:
    """A forecaster ("bundled" or a directory that we saved) as vLLM's Llama; CheckpointError for anything unusable."""
    module, spec = bundled.load_module(name)
    folder = tempfile.TemporaryDirectory(prefix="sdt-vllm-")
    with quiet_transformers():
        module.save_pretrained(folder.name)
    return Forecaster(open_model(Path(folder.name), keep=folder), spec)


def open_model(
    directory: Path,
    *,
    trust_remote_code: bool = False,
    prompt_embeddings: bool = False,
    keep: Any = None,
    **settings: Any,
) -> Any:
    """A `VllmModel` on all GPUs that this process sees (tensor parallel where there are several), else on the CPU.

    prompt_embeddings: take `Root.embeddings`, which costs a little of every step. settings: more of vLLM's own engine
    arguments. keep: what must live as long as the model. Raises ConfigurationError when vLLM refuses the model,
    CheckpointError for weights that cannot be read, and FleetError when the start-up probe fails.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        from sdt_dist.models.vllm.engine import Engine
        from sdt_dist.models.vllm.model import VllmModel
    except ImportError as error:
        raise ConfigurationError(
            f"{_NEEDED}; {_version()} lacks something: {first_line(error)}."
        ) from error
    chosen = {
        "model": str(directory),
        "skip_tokenizer_init": True,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "trust_remote_code": trust_remote_code,
        "enable_prompt_embeds": prompt_embeddings,
        **_device_settings(),
        **settings,
    }
    check_weights(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        engine = Engine(chosen)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"model: vLLM cannot serve {directory}: {first_line(error)}"
        ) from error
    _probe(VllmModel(engine, directory, config))
    return VllmModel(engine, directory, config, keep=keep)


def _version() -> str:
    from vllm import __version__  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    return f"vLLM {__version__}"


def _device_settings() -> dict[str, Any]:
    devices = torch.cuda.device_count()
    if devices:
        return {
            "tensor_parallel_size": devices,
            "distributed_executor_backend": "uni" if devices == 1 else "mp",
        }
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 30,
        "distributed_executor_backend": "uni",
    }


def _probe(model: Any) -> None:
    """FleetError unless the engine reduces rows, draws tokens and reports them as all of this relies on."""
    law = PriorLaw((0, model.vocab_size))
    root = Root((0, 1), prompt_digest((0, 1)))
    try:
        model.rollout([RolloutRequest(root, (), 3, 1), RolloutRequest(root, (1,), 2, None)], law)
        model.expand([ExpandRequest(root, (1,), 2, 3)], law)
    except Exception as error:
        model.close()
        raise FleetError(f"{_NEEDED}; the probe of {_version()} failed: {error}") from error
    model.release(root)
