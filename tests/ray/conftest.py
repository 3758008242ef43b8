"""One local Ray for the session, started when a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray on this machine with eight CPUs in its books, so that every fleet of these tests fits; token auth is on."""
    import ray

    ray.init(
        address="local",
        namespace="sdt-tests",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
