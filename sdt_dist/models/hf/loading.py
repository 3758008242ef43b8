"""Loading language models through Transformers: directories and hub ids, safetensors only.

See docs/architecture/search.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sdt_dist.errors import CheckpointError, ConfigurationError, first_line
from sdt_dist.models.hf.model import HFModel
from sdt_dist.models.language import LanguageModel


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers without progress bars and warnings while a model loads; its settings come back afterwards."""
    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_language_model(
    name: str, *, device: str | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """A causal language model from a directory or hub id, float32 on the CPU; safetensors only.

    ConfigurationError when it cannot be found, CheckpointError when only pickled weights exist, or weights are
    damaged or missing (Transformers would make them up).
    """
    directory = Path(name)
    if directory.is_dir() and not list(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"model: {name} holds no .safetensors weights; pickled checkpoints are refused."
        )
    if not directory.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ConfigurationError(
            f"model: {name!r} is neither 'bundled', a directory, nor a hub id 'owner/name'."
        )
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if target == "cpu" else "auto"
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
            module, loaded = cast(Any, AutoModelForCausalLM).from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model: {name!r} cannot be loaded: {first_line(error)}"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"model: {name!r} has damaged weights: {first_line(error)}"
        ) from error
    if loaded["missing_keys"]:
        raise CheckpointError(
            f"model: {name!r} lacks weights, first {min(loaded['missing_keys'])!r}."
        )
    module.to(torch.device(target))  # type: ignore[arg-type]
    return LanguageModel(HFModel(module.eval()), tokenizer)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id; OSError or ValueError when there is none."""
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
