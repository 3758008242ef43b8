"""Loading models through mlx-lm: directories, hub ids and forecasters; safetensors only, no code of theirs runs.

mlx-lm reads rotary settings under its own names and fills in 10000 where they are missing, without a word. What
Transformers 5 writes under `rope_parameters` is therefore handed over by name, and checked to have arrived.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx_lm import utils as mlx_lm
from mlx_lm.models import llama

from sdt_dist.errors import CheckpointError, ConfigurationError, first_line
from sdt_dist.models.directory import model_directory
from sdt_dist.models.forecaster import bundled
from sdt_dist.models.forecaster.process import Forecaster
from sdt_dist.models.hf.loading import load_tokenizer
from sdt_dist.models.language import LanguageModel
from sdt_dist.models.mlx.model import MlxModel

_OWN_FIELDS = ("rope_theta", "partial_rotary_factor")  # the rest belongs to rope_scaling
# how mlx says that weights are not those of the network
_UNFIT = (
    "Missing",
    "Received",
    "Expected shape",
)


def load_language_model(name: str) -> LanguageModel:
    """A causal language model from a directory or hub id, with its tokenizer; errors as in `load_module`."""
    directory = model_directory(name)
    module, config = load_module(directory)
    try:
        tokenizer = load_tokenizer(str(directory))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model: {name!r} cannot be loaded: {first_line(error)}"
        ) from error
    return LanguageModel(MlxModel(module, config), tokenizer)


def load_module(directory: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """A directory's module, float32 on a CPU and as stored on a GPU, and its configuration.

    ConfigurationError when mlx-lm does not know the architecture or its rotary settings, CheckpointError when weights
    are damaged or missing.
    """
    folder = Path(directory)
    try:
        settings = rope_settings(mlx_lm.load_config(folder))
        module, config, *_ = mlx_lm.load_model(folder, model_config=settings)
    except RuntimeError as error:
        raise CheckpointError(
            f"model: {folder} has damaged weights: {first_line(error)}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        kind = CheckpointError if str(error).startswith(_UNFIT) else ConfigurationError
        raise kind(f"model: {folder} cannot be loaded: {first_line(error)}") from error
    check_rope(module, config)
    return _ready(module), config


def load_forecaster(name: str) -> Forecaster:
    """A forecaster ("bundled" or a directory that we saved) as mlx-lm's Llama; CheckpointError for anything unusable."""
    plain, spec = bundled.load_module(name)
    config = plain.config.to_dict()
    config |= rope_settings(config)
    module = llama.Model(llama.ModelArgs.from_dict(config))
    weights = {key: mx.array(value.numpy()) for key, value in plain.state_dict().items()}
    module.load_weights(list(module.sanitize(weights).items()))
    check_rope(module, config)
    return Forecaster(MlxModel(_ready(module), config), spec)


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration of Transformers 5 says under `rope_parameters`, in mlx-lm's words; {} when nothing.

    Settings per kind of layer have no such words; the architectures that have them read `rope_parameters`.
    """
    found: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not _is_per_layer(rope):
        scaling = {key: value for key, value in rope.items() if key not in _OWN_FIELDS}
        found = {key: rope[key] for key in _OWN_FIELDS if rope.get(key) is not None}
        if scaling.get("rope_type", "default") != "default":
            found["rope_scaling"] = scaling
    text = config.get("text_config")
    if isinstance(text, dict) and (inner := rope_settings(text)):
        found["text_config"] = {**text, **inner}
    return found


def check_rope(module: nn.Module, config: dict[str, Any]) -> None:
    """ConfigurationError unless the loaded module holds the rotary settings of its configuration."""
    text = config.get("text_config")
    parts = [
        (module, config),
        (getattr(module, "language_model", module), text if isinstance(text, dict) else {}),
    ]
    for part, values in parts:
        args = getattr(part, "args", None)
        rope = values.get("rope_parameters")
        if not isinstance(rope, dict) or hasattr(args, "rope_parameters"):
            continue
        wanted = (
            {"rope_parameters": rope}
            if _is_per_layer(rope)
            else rope_settings({"rope_parameters": rope})
        )
        for field, value in wanted.items():
            if not _holds(getattr(args, field, 10000.0 if field == "rope_theta" else None), value):
                raise ConfigurationError(
                    f"model: mlx-lm has no {field} for {values.get('model_type')!r}, whose configuration says {value}; "
                    "its scores would be wrong. Use hf: (Transformers) instead."
                )


def _holds(found: Any, wanted: Any) -> bool:
    """Whether a setting is what it should be; an architecture may add defaults to a group of them."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return all(found.get(key) == value for key, value in wanted.items())
    return found == wanted


def _is_per_layer(rope: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in rope.values())


def _ready(module: nn.Module) -> nn.Module:
    """The module in evaluation mode with its weights in memory: on a CPU in float32, quantised ones packed."""
    if mx.default_device() == mx.Device(cast(Any, mx.cpu)):
        module.set_dtype(mx.float32)
    module.eval()
    mx.eval(module.parameters())
    return module
