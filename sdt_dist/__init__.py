"""SpecDiffTree: samples of p(x|c)·exp(λ·r(x)) by tree search over a frozen generative model.

Heavy parts (torch, transformers, numba) load when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "load_model": "sdt_dist.models.loading",
    "search": "sdt_dist.search.api",
    "SearchResult": "sdt_dist.search.result",
    "SpectralReward": "sdt_dist.rewards.spectral",
    "Snapshot": "sdt_dist.tree.snapshot",
    "Sample": "sdt_dist.protocols",
    "LLMInterface": "sdt_dist.protocols",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sdt_dist' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
