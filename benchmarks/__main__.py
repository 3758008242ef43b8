"""All quick benchmarks in one go: `python -m benchmarks` (tree cost, decoding). Others are run by name.

Run by name, with real series through SDT_DATA_DIR: `benchmarks.forecaster`, `benchmarks.alignment`,
`benchmarks.throughput`.
"""

from __future__ import annotations

import subprocess
import sys

QUICK = ("tree_cost", "decoding")


def main() -> None:
    for name in QUICK:
        print(f"\n== benchmarks.{name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
