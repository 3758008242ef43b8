"""Thin Ray wrappers of the fleet's plain classes, one a file, and the backend that starts and kills them.

May import: `actors` and below. This and `fleet.py` are where the fleet meets Ray; no logic lives here. Control methods
have their own concurrency group, so that a probe is answered while a batch runs.
To add an actor: a plain class in `actors/`, its wrapper here, its kind in the table of `backend.py`.
"""

from sdt_dist.extras import packages_of

with packages_of("cluster", "the fleet"):
    import ray  # noqa: F401  (first, so that every module of this room may import it plainly)
