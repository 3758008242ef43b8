"""A Ray that can hold a fleet: started here or attached to, checked for room, with the fleet's dashboard beside its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdt_dist.actors.config import FleetConfig
from sdt_dist.extras import check_package


@contextmanager
def attached(
    size: FleetConfig, say: Callable[[str], None], *, shards: bool = False
) -> Iterator[None]:
    """Ray for a fleet of this size for as long as the context lasts; `say` is told the dashboard's address.

    Errors as for `connect`, and ConfigurationError for a cluster that cannot hold the fleet.
    """
    check_package("ray", "cluster", "a fleet")
    from sdt_dist.actors.placement import check_placement, cluster_nodes, fleet_requests
    from sdt_dist.cluster.connect import connect
    from sdt_dist.cluster.dashboard import place_dashboard

    requests = fleet_requests(size, shards=shards)
    needed = sum(request.count * request.placement.cpus for request in requests) + 1
    with connect(
        size.address,
        timeout_s=size.connect_timeout_s,
        num_cpus=max(os.cpu_count() or 1, math.ceil(needed)),
    ) as connection:
        check_placement(requests, cluster_nodes())
        if connection.dashboard_url:
            say(f"Ray dashboard: {connection.dashboard_url}")
        place_dashboard()
        yield
