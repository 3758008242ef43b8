"""MODEL SPEC to model: `bundled`, a directory, a hub id, all with or without a backend prefix, or a server's address.

docs/reference/cli.md; `sdt serve` is the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdt_dist.errors import ConfigurationError, unknown_name
from sdt_dist.extras import check_package
from sdt_dist.models.remote.http_api import check_url

if TYPE_CHECKING:
    import torch

BACKENDS = ("hf", "mlx", "vllm", "http", "https")
_HTTP = ("http", "https")
_FLOWLESS = ("vllm",)
_EXTRAS = {"mlx": "mlx_lm", "vllm": "vllm"}  # by the package that each needs
_OWN_DEVICES = {
    "mlx": "MLX chooses its own: the GPU of a Mac, else the CPU.",
    "vllm": "vLLM takes all GPUs that the process sees (CUDA_VISIBLE_DEVICES), else the CPU.",
}


def split_spec(spec: str) -> tuple[str, str]:
    """(backend, name) of a MODEL SPEC; ConfigurationError for an unknown backend prefix or an empty name.

    The name of a model behind a server is its whole address.
    """
    prefix, colon, rest = spec.partition(":")
    if not colon or Path(spec).exists():
        prefix = "hf"
        rest = spec
    if prefix not in BACKENDS:
        raise unknown_name("model backend", prefix, BACKENDS)
    if not rest:
        raise ConfigurationError(
            f"model: {spec!r} names no model; give 'bundled', a directory or a hub id."
        )
    return (prefix, spec) if prefix in _HTTP else (prefix, rest)


def check_spec(spec: str) -> None:
    """Everything about a MODEL SPEC that can be refused without loading weights."""
    backend, name = split_spec(spec)
    if backend in _HTTP:
        check_url(name)
        return
    package = _EXTRAS.get(backend)
    if package is not None:
        check_package(package, backend, f"model: the {backend} backend")
    looks_like_path = name.startswith((".", "/", "~"))
    if name != "bundled" and not Path(name).exists() and (looks_like_path or name.count("/") != 1):
        if name.count("/") == 0:
            raise unknown_name("model", name, ["bundled"])
        raise ConfigurationError(
            f"model: {name!r} does not exist; give 'bundled', a directory, or a hub id."
        )


def check_flow_backend(spec: str) -> None:
    """ConfigurationError for a MODEL SPEC whose backend cannot hold flows."""
    backend, _ = split_spec(spec)
    if backend in _FLOWLESS:
        raise ConfigurationError(
            f"flow: given, but model {spec!r} cannot hold flow networks, as its rows are reduced inside its engine; allowed "
            f"backends: {', '.join(name for name in BACKENDS if name not in _FLOWLESS)}. Leave the flow out, or choose one "
            "of these."
        )


def torch_device(name: str) -> torch.device:
    """A torch device that this machine has; ConfigurationError otherwise."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # AssertionError: a torch that was built without CUDA
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        raise ConfigurationError(
            f"device: {name!r}, this machine has: {', '.join(['cpu', *gpus, *mps])}."
        ) from error
    return device


def load_model(
    spec: str = "bundled", *, device: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A `Forecaster` (bundled, or a directory that `sdt train-forecaster` saved), a `LanguageModel` or a `ServedModel`.

    All have `.model` (the backend) and `.process(max_new_tokens)`. device: None picks CUDA when there is one for
    language models, and the CPU for forecasters; MLX and vLLM choose for themselves. An address (http://127.0.0.1:8011,
    https://HOST:PORT) gives the model of the `sdt serve` that runs there, with the token in SDT_HTTP_TOKEN; torch is
    not imported for it.
    Raises ConfigurationError, CheckpointError or MissingExtraError, or FleetError when a server cannot be reached.
    """
    check_spec(spec)
    backend, name = split_spec(spec)
    if backend in _HTTP:
        return _served_model(name, device)
    if device is not None and backend in _OWN_DEVICES:
        raise ConfigurationError(f"device: {device!r}, but {_OWN_DEVICES[backend]}")
    if backend == "mlx":
        return _mlx_model(name, trust_remote_code)
    if backend == "vllm":
        return _vllm_model(name, trust_remote_code)
    target = None if device is None else torch_device(device)

    from sdt_dist.models.forecaster.bundled import load_module
    from sdt_dist.models.forecaster.process import Forecaster
    from sdt_dist.models.forecaster.spec import forecaster_directory
    from sdt_dist.models.hf.loading import load_language_model
    from sdt_dist.models.hf.model import HFModel

    if forecaster_directory(name) is None:
        return load_language_model(name, device=device, trust_remote_code=trust_remote_code)
    module, forecaster_spec = load_module(name)
    if target is not None:
        module.to(target)  # type: ignore[arg-type]
    return Forecaster(HFModel(module), forecaster_spec)


def _mlx_model(name: str, trust_remote_code: bool) -> Any:
    from sdt_dist.models.forecaster.spec import forecaster_directory
    from sdt_dist.models.mlx.loading import load_forecaster, load_language_model

    if trust_remote_code:
        raise ConfigurationError(
            "trust_remote_code: True, but the mlx backend never runs code that comes with a model."
        )
    return (
        load_language_model(name) if forecaster_directory(name) is None else load_forecaster(name)
    )


def _vllm_model(name: str, trust_remote_code: bool) -> Any:
    from sdt_dist.models.forecaster.spec import forecaster_directory
    from sdt_dist.models.vllm.loading import load_forecaster, load_language_model

    if forecaster_directory(name) is None:
        return load_language_model(name, trust_remote_code=trust_remote_code)
    return load_forecaster(name)


def _served_model(url: str, device: str | None) -> Any:
    from sdt_dist.models.card import ServedModel
    from sdt_dist.models.remote.http_client import HttpModel

    if device is not None:
        raise ConfigurationError(
            f"device: {device!r}, but {url} chooses its own; give it to `sdt serve --device`."
        )
    model = HttpModel(url)
    return ServedModel(model.card, model)
