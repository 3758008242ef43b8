"""MODEL SPEC to model: `bundled`, a directory or hub id, optionally with a backend prefix (SPEC section 9)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdt_dist.errors import ConfigurationError, MissingExtraError, unknown_name

if TYPE_CHECKING:
    import torch

BACKENDS = ("hf",)
_EXTRAS = ("vllm", "mlx")


def split_spec(spec: str) -> tuple[str, str]:
    """(backend, name) of a MODEL SPEC; ConfigurationError for an unknown backend prefix or an empty name."""
    prefix, colon, rest = spec.partition(":")
    if not colon or Path(spec).exists():
        prefix, rest = "hf", spec
    if prefix in _EXTRAS:
        raise MissingExtraError(
            f"model: the {prefix!r} backend is not part of this release yet; use hf:{rest} (Transformers) instead."
        )
    if prefix not in BACKENDS:
        raise unknown_name("model backend", prefix, [*BACKENDS, *_EXTRAS])
    if not rest:
        raise ConfigurationError(f"model: {spec!r} names no model; give 'bundled', a directory or a hub id.")
    return prefix, rest


def check_spec(spec: str) -> None:
    """Everything about a MODEL SPEC that can be refused without loading weights."""
    _, name = split_spec(spec)
    looks_like_path = name.startswith((".", "/", "~"))
    if name != "bundled" and not Path(name).exists() and (looks_like_path or name.count("/") != 1):
        if name.count("/") == 0:
            raise unknown_name("model", name, ["bundled"])
        raise ConfigurationError(f"model: {name!r} does not exist; give 'bundled', a directory, or a hub id.")


def torch_device(name: str) -> torch.device:
    """A torch device that this machine has; ConfigurationError otherwise."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        raise ConfigurationError(f"device: {name!r}, this machine has: {', '.join(['cpu', *gpus, *mps])}.") from error
    return device


def load_model(spec: str = "bundled", *, device: str | None = None, trust_remote_code: bool = False) -> Any:
    """A `Forecaster` (bundled, or a directory that `sdt train-forecaster` saved) or a `LanguageModel`.

    Both have `.model` (the backend) and `.process(max_new_tokens)`. device: None picks CUDA when there is one for
    language models, and the CPU for forecasters. Raises ConfigurationError, CheckpointError or MissingExtraError.
    """
    check_spec(spec)
    _, name = split_spec(spec)
    target = None if device is None else torch_device(device)

    from sdt_dist.models.forecaster.bundled import forecaster_directory, load_module
    from sdt_dist.models.forecaster.process import Forecaster
    from sdt_dist.models.hf.language import load_language_model
    from sdt_dist.models.hf.model import HFModel

    if forecaster_directory(name) is None:
        return load_language_model(name, device=device, trust_remote_code=trust_remote_code)
    module, forecaster_spec = load_module(name)
    if target is not None:
        module.to(target)  # type: ignore[arg-type]
    return Forecaster(HFModel(module), forecaster_spec)
