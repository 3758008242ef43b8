"""Where a model's files are, for backends that read directories in Transformers' layout.

See docs/architecture/search.md.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdt_dist.errors import CheckpointError, ConfigurationError, first_line

_WEIGHTS = "model*.safetensors"
_DOWNLOADS = ["*.json", _WEIGHTS, "tokenizer.model", "*.txt", "*.jinja"]  # no Python files


def model_directory(name: str) -> Path:
    """Where a model's files are, downloaded when `name` is a hub id.

    ConfigurationError when there is no such model, CheckpointError when it has no safetensors.
    """
    directory = Path(name)
    if not directory.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ConfigurationError(
                f"model: {name!r} is neither 'bundled', a directory, nor a hub id 'owner/name'."
            )
        from huggingface_hub import snapshot_download

        try:
            directory = Path(snapshot_download(name, allow_patterns=_DOWNLOADS))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"model: {name!r} cannot be loaded: {first_line(error)}"
            ) from error
    if not list(directory.glob(_WEIGHTS)):
        raise CheckpointError(
            f"model: {name} holds no {_WEIGHTS} weights; pickled checkpoints are refused."
        )
    return directory


def check_weights(directory: Path) -> None:
    """CheckpointError for a weight file whose header or size is damaged."""
    for path in sorted(directory.glob(_WEIGHTS)):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"model: {path} has damaged weights: {first_line(error)}"
            ) from error
