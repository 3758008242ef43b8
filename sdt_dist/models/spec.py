"""MODEL SPEC: `bundled`, a directory, a hub id, all with or without a backend prefix, or a server's address.

docs/reference/cli.md. What can be refused, and what its model will answer, before anything is loaded. It must not import
torch or transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdt_dist.errors import ConfigurationError, unknown_name
from sdt_dist.extras import check_package
from sdt_dist.models.forecaster.spec import forecaster_directory
from sdt_dist.models.kinds import KINDS
from sdt_dist.models.process import LawfulStates
from sdt_dist.models.remote.http_api import check_url
from sdt_dist.parts import Form

BACKENDS = ("hf", "mlx", "vllm", "http", "https")
HTTP = ("http", "https")
OWN_DEVICES = {
    "mlx": "MLX chooses its own: the GPU of a Mac, else the CPU.",
    "vllm": "vLLM takes all GPUs that the process sees (CUDA_VISIBLE_DEVICES), else the CPU.",
}
_FLOWLESS = ("vllm",)
_EXTRAS = {"mlx": "mlx_lm", "vllm": "vllm"}  # by the package that each needs


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
    return (prefix, spec) if prefix in HTTP else (prefix, rest)


def check_spec(spec: str) -> None:
    """Everything about a MODEL SPEC that can be refused without loading weights."""
    backend, name = split_spec(spec)
    if backend in HTTP:
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


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of the model of a MODEL SPEC before it loads.

    path: where this machine has it; None for a hub id or an address. kind: its entry of `KINDS`, as far as that can be told:
    what is not seen to be anything else passes for a language model.
    """

    backend: str
    name: str
    path: Path | None
    kind: str

    @property
    def sample_view(self) -> Form:
        """What of a sample a plain function is given as a reward."""
        return KINDS[self.kind].sample_view

    @property
    def is_small(self) -> bool:
        """Whether this machine holds several copies of it; backends other than hf take the device for one."""
        return self.backend == "hf" and KINDS[self.kind].is_small

    @property
    def context_length(self) -> int | None:
        """How many of a series' last values count, None where it takes no series; CheckpointError for a damaged spec."""
        return KINDS[self.kind].context_length(_Saved.read(self))

    def states(self, max_new_tokens: int) -> LawfulStates:
        """How the states of a model whose samples are series read; SdtError for a damaged spec or a length out of range."""
        saved = _Saved.read(self)
        return KINDS[self.kind].states(saved, saved, max_new_tokens)


def outlook_of(spec: str) -> Outlook:
    """What a MODEL SPEC would be; ConfigurationError as in `split_spec`."""
    backend, name = split_spec(spec)
    directory = forecaster_directory(name)
    if directory is not None:
        return Outlook(backend, name, directory, "forecaster")
    return Outlook(backend, name, Path(name) if Path(name).exists() else None, "language")


@dataclass(frozen=True, slots=True)
class _Saved:
    """What a card would say of a model whose files lie on this machine."""

    name: str
    spec: dict[str, Any]
    deterministic: bool = True

    @classmethod
    def read(cls, outlook: Outlook) -> _Saved:
        return cls(outlook.name, KINDS[outlook.kind].saved_spec(outlook.path))

    @property
    def vocab_size(self) -> int:
        return self.spec["vocab_size"]

    @property
    def max_context(self) -> int:
        return self.spec["context_length"] + self.spec["max_horizon"]
