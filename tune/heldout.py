"""The chosen configuration against the defaults on other windows than the sweep's: `python -m sdt_dist.tune.heldout DIR`.

DIR is what `sdt evaluate heldout.yaml` wrote. Nothing is searched here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sdt_dist.errors import ResultsError, SdtError
from sdt_dist.evaluation.results import read_problems
from sdt_dist.evaluation.summary import tabulate
from sdt_dist.tune.choice import CHOSEN, DEFAULTS
from sdt_dist.tune.objectives import Measured, measure_rows

_METRICS = ("crps", "mase", "spec_w1", "log_l1", "nfe")


def compare_on_heldout(directory: Path) -> Measured:
    """{metric: {mean, low, high}} of chosen minus defaults, paired over problems, 95% bootstrap; below 0 is better but for nfe.

    ResultsError where the directory does not hold both.
    """
    from sdt_dist.metrics.aggregate import paired_difference

    found = tabulate(directory)
    if not {CHOSEN, DEFAULTS} <= found.keys():
        raise ResultsError(
            f"results: {directory} has {', '.join(found) or 'no results'}, not {CHOSEN} and {DEFAULTS}; give what `sdt evaluate "
            "heldout.yaml` wrote."
        )
    chosen = found[CHOSEN]
    defaults = found[DEFAULTS]
    both = {
        m: [i for i, row in chosen.items() if m in row and m in defaults.get(i, {})]
        for m in _METRICS
    }
    return {
        metric: paired_difference(
            np.array([chosen[i][metric] for i in own]), np.array([defaults[i][metric] for i in own])
        )
        for metric, own in both.items()
        if own
    }


def main() -> None:
    """Print the paired differences, and the Spec-W1 gaps of both, which are no mean over problems."""
    try:
        directory = Path(sys.argv[1])
        for metric, found in compare_on_heldout(directory).items():
            print(f"{metric:8} {found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]")
        rows = tabulate(directory)
        problems = read_problems(directory)
        for label in (CHOSEN, DEFAULTS):
            gap = measure_rows(rows[label], problems, ["spec_w1_gap"]).get("spec_w1_gap")
            if gap is not None:
                print(
                    f"Spec-W1 gap of {label}: {gap['mean']:.4f} [{gap['low']:.4f}, {gap['high']:.4f}]"
                )
    except (SdtError, IndexError) as error:
        print(
            f"sdt_dist.tune.heldout: {' '.join(str(error).split())}; usage: python -m sdt_dist.tune.heldout DIR",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
