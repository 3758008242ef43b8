"""MLX models as backends: one batched decode over mlx-lm's modules, on Apple Silicon or an ordinary CPU.

May import: models, protocols and below, mlx, mlx-lm. To add an architecture that mlx-lm reads otherwise: `loading.py`,
held to the conformance suite. Importing this raises MissingExtraError where mlx-lm is not installed.
"""

from __future__ import annotations

import resource

from sdt_dist.extras import packages_of

_SOFT, _HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
try:
    with packages_of("mlx", "model: the mlx backend"):
        import mlx_lm as _mlx_lm  # noqa: F401
finally:  # mlx-lm lowers this process's limits on open files; the hard one may be out of reach afterwards
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_SOFT, _HARD))
    except ValueError:
        _LEFT = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_SOFT, _LEFT), _LEFT))
