"""`python -m sdt_dist` is the `sdt` command."""

from __future__ import annotations

from sdt_dist.cluster.cli import main

if __name__ == "__main__":
    main()
