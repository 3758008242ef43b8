"""MODEL SPEC to model; `models.spec` says what a spec is, and `sdt serve` is the server of an address.

See docs/reference/cli.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdt_dist.errors import ConfigurationError
from sdt_dist.models.spec import HTTP, OWN_DEVICES, Outlook, check_spec, outlook_of

if TYPE_CHECKING:
    import torch


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
    outlook = outlook_of(spec)
    backend = outlook.backend
    if backend in HTTP:
        return _served_model(outlook.name, device)
    if device is not None and backend in OWN_DEVICES:
        raise ConfigurationError(f"device: {device!r}, but {OWN_DEVICES[backend]}")
    if backend == "hf":
        return _hf_model(outlook, device, trust_remote_code)
    return {"mlx": _mlx_model, "vllm": _vllm_model}[backend](outlook, trust_remote_code)


def _hf_model(outlook: Outlook, device: str | None, trust_remote_code: bool) -> Any:
    target = None if device is None else torch_device(device)

    from sdt_dist.models.forecaster.bundled import load_module
    from sdt_dist.models.forecaster.process import Forecaster
    from sdt_dist.models.hf.loading import load_language_model
    from sdt_dist.models.hf.model import HFModel

    def load_forecaster() -> Forecaster:
        module, forecaster_spec = load_module(outlook.name)
        if target is not None:
            module.to(target)  # type: ignore[arg-type]
        return Forecaster(HFModel(module), forecaster_spec)

    def load_language() -> Any:
        return load_language_model(outlook.name, device=device, trust_remote_code=trust_remote_code)

    return {"forecaster": load_forecaster, "language": load_language}[outlook.kind]()


def _mlx_model(outlook: Outlook, trust_remote_code: bool) -> Any:
    from sdt_dist.models.mlx.loading import load_forecaster, load_language_model

    if trust_remote_code:
        raise ConfigurationError(
            "trust_remote_code: True, but the mlx backend never runs code that comes with a model."
        )
    loaders = {"forecaster": load_forecaster, "language": load_language_model}
    return loaders[outlook.kind](outlook.name)


def _vllm_model(outlook: Outlook, trust_remote_code: bool) -> Any:
    from sdt_dist.models.vllm.loading import load_forecaster, load_language_model

    def load_language(name: str) -> Any:
        return load_language_model(name, trust_remote_code=trust_remote_code)

    loaders = {"forecaster": load_forecaster, "language": load_language}
    return loaders[outlook.kind](outlook.name)


def _served_model(url: str, device: str | None) -> Any:
    from sdt_dist.models.card import ServedModel
    from sdt_dist.models.remote.http_client import HttpModel

    if device is not None:
        raise ConfigurationError(
            f"device: {device!r}, but {url} chooses its own; give it to `sdt serve --device`."
        )
    model = HttpModel(url)
    return ServedModel(model.card, model)
