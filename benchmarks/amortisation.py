"""Whether a learned flow saves rollouts: quality against nfe and wall time on held-out contexts, each use of F apart.

    python -m benchmarks.amortisation --flow bundled --output results/amortisation [--resume]

24 contexts that no flow was trained on (12 windows of ETTh1's test part, 12 series of M4 Hourly), horizon 48, the spectral
reward with gamma = 1 at lambda = 20. Measures, fixed before the first run: mean log Z-hat (its expectation is at most log
Z, so higher is better), the gap of Spec-W1 to that of the true futures (near 0 is better), and CRPS. Budgets are
rollouts; a row's nfe is what its searches did pay. The ratio is the nfe of dts with 2,000 rollouts over the nfe at which a
method's curve, linear in log nfe between its budgets, reaches the same mean. Leaf values claim no log Z.
Added after the first look, because the mean log Z-hat of dts does not rise with its budget: the root mean square error of log
Z-hat against all other unbiased estimates of the run, pooled by nfe, and by how much more snis must pay for the same. Searches are made by
`sdt evaluate`, so a run can be killed and resumed; the tables and figures are made from its result files alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml

from sdt_dist.data import load_problems
from sdt_dist.evaluation.summary import tabulate, truth_measures
from sdt_dist.files import replace_file, write_text
from sdt_dist.metrics.aggregate import summarise
from sdt_dist.report.figures.axes import subplots

HORIZON = 48
LAMBDA = 20.0
CONTEXTS = 12
DATASETS = ("etth1", "m4_hourly")
TREES = (50, 200, 500, 2000)
DRAWS = (50, 200, 500)
WALKS = (500, 2000)
PROPOSED = (25, 50, 100, 200, 500)
FEW = (25, 100, 200)
FEWER = (50, 200)
YARDSTICK = ("dts", 2000)
MEASURES = {"log_z": "mean log Ẑ", "gap": "Spec-W1 − the truth's", "crps": "CRPS"}
ERROR = "squared_error"
DRAWN = {ERROR: "RMSE of log Ẑ", **MEASURES}
UNBIASED = (
    "snis", "residual_ts", "snis, F proposes", "smc, F twists", "s_adt: proposal", "s_adt: selection mix",
    "s_adt: proposal, mix",
)  # fmt: skip
BASE = "snis"
_SHARE = 0.95  # of num_rollouts * horizon, as in `sdt evaluate`
Curve = dict[int, dict[str, np.ndarray]]  # by budget: each measure's values over contexts

VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "snis": ({"name": "snis"}, DRAWS),
    "smc": ({"name": "smc"}, DRAWS),
    "dts": ({"name": "dts"}, TREES),
    "residual_ts": ({"name": "residual_ts"}, DRAWS),
    "snis, F proposes": ({"name": "snis", "flow": True}, FEW),
    "smc, F twists": ({"name": "smc", "flow": True}, FEW),
    "s_adt: proposal": ({"name": "s_adt"}, PROPOSED),
    "s_adt: selection mix": (
        {"name": "s_adt", "options": {"proposal": False, "alpha": 0.5}},
        FEWER,
    ),
    "s_adt: proposal, mix": ({"name": "s_adt", "options": {"alpha": 0.5}}, FEWER),
    "s_adt: leaf values": (
        {"name": "s_adt", "options": {"proposal": False, "leaf_values": True, "draw": "fall"}},
        WALKS,
    ),
    "s_adt: all": (
        {"name": "s_adt", "options": {"alpha": 0.5, "leaf_values": True, "draw": "fall"}},
        WALKS,
    ),
}


def configuration(dataset: str, flow: str) -> dict[str, Any]:
    """What `sdt evaluate` is given for one dataset."""
    methods = []
    for label, (method, budgets) in VARIANTS.items():
        for budget in budgets:
            nfe = max(HORIZON, round(_SHARE * budget * HORIZON))
            options = {"num_rollouts": budget, "max_nfe": nfe, **method.get("options", {})}
            methods.append({**method, "label": f"{label} @{budget}", "options": options})
    return {
        "dataset": dataset, "num_problems": CONTEXTS, "horizon": HORIZON, "inverse_temperature": LAMBDA, "flow": flow,
        "num_rollouts": 200, "num_samples": 50, "wave_size": 10, "methods": methods,
    }  # fmt: skip


def run(flow: str, output: Path, resume: bool) -> None:
    """Search every context with every method and budget; kills lose nothing."""
    output.mkdir(parents=True, exist_ok=True)
    for dataset in DATASETS:
        path = output / f"{dataset}.yaml"
        write_text(path, yaml.safe_dump(configuration(dataset, flow), sort_keys=False))
        command = [
            sys.executable,
            "-m",
            "sdt_dist.cluster.cli",
            "evaluate",
            str(path),
            "--output",
            str(output / dataset),
        ]
        subprocess.run([*command, "--resume"] if resume else command, check=True)


def curves(output: Path) -> dict[str, Curve]:
    """Every method's measures by budget, over the contexts of all datasets, from result files."""
    found: dict[str, Curve] = {}
    for dataset in DATASETS:
        problems = load_problems(dataset, split="test", horizon=HORIZON, num_problems=CONTEXTS)
        truth = truth_measures(problems)["problems"]
        own = {problem.index: truth[problem.name]["spec_w1"] for problem in problems}
        for label, rows in tabulate(output / dataset).items():
            name, budget = label.split(" @")
            columns: dict[str, list[float]] = {
                m: [] for m in ("log_z", "gap", "crps", "nfe", "wall_s", "ess")
            }
            for index, row in sorted(rows.items()):
                row = {**row, "gap": row["spec_w1"] - own[index]}
                for measure, column in columns.items():
                    column.append(row.get(measure, np.nan))
            curve = found.setdefault(name, {}).setdefault(int(budget), {})
            for measure, column in columns.items():
                curve[measure] = np.concatenate([curve.get(measure, np.zeros(0)), column])
    errors = {
        (name, budget): squared_errors(found, name, budget)
        for name, curve in found.items()
        for budget in curve
    }
    for (name, budget), error in errors.items():
        found[name][budget][ERROR] = error
    return found


def _summary(columns: dict[str, np.ndarray], measure: str) -> dict[str, float]:
    """Mean and interval over contexts; of squared errors their roots."""
    found = summarise(columns[measure])
    return {key: value**0.5 for key, value in found.items()} if measure == ERROR else found


def _cell(values: np.ndarray, digits: int) -> str:
    if np.isnan(values).any():
        return "–"
    found = summarise(values)
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def table(found: dict[str, Curve]) -> str:
    """Markdown: a row per method and budget."""
    lines = [
        f"| method | rollouts | nfe | wall s | {' | '.join(MEASURES.values())} |",
        "|---|" + "---:|" * 6,
    ]
    for name, curve in found.items():
        for budget, columns in curve.items():
            cells = [
                _cell(columns["log_z"], 2),
                _cell(columns["gap"], 4),
                _cell(columns["crps"], 3),
            ]
            nfe = columns["nfe"].mean()
            wall = columns["wall_s"].mean()
            lines.append(f"| {name} | {budget:,} | {nfe:,.0f} | {wall:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reached_at(costs: np.ndarray, means: np.ndarray, target: float) -> float:
    """Cost at which means [N] at rising costs [N] first reach a target, linear in log cost; the first cost, or nan if never."""
    above = np.flatnonzero(means >= target)
    if not len(above):
        return np.nan
    i = int(above[0])
    if i == 0:
        return float(costs[0])
    share = (target - means[i - 1]) / (means[i] - means[i - 1])
    return float(np.exp(np.log(costs[i - 1]) + share * (np.log(costs[i]) - np.log(costs[i - 1]))))


def ratios(found: dict[str, Curve]) -> str:
    """Markdown: by how much less nfe and wall time each method reaches the yardstick's mean log Z-hat."""
    yardstick = found[YARDSTICK[0]][YARDSTICK[1]]
    goal = float(yardstick["log_z"].mean())
    lines = [
        f"{YARDSTICK[0]} with {YARDSTICK[1]:,} rollouts: mean log Ẑ {goal:.3f}, nfe {yardstick['nfe'].mean():,.0f}, "
        f"{yardstick['wall_s'].mean():.1f} s.",
        "",
        "| method | nfe there | ratio of nfe | ratio of wall time |",
        "|---|---:|---:|---:|",
    ]
    for name, curve in found.items():
        columns = list(curve.values())
        means = np.array([c["log_z"].mean() for c in columns])
        if np.isnan(means).any():
            continue
        nfe, wall = (np.array([c[m].mean() for c in columns]) for m in ("nfe", "wall_s"))
        at = reached_at(nfe, means, goal)
        seconds = reached_at(wall, means, goal)
        first = "≥ " if means[0] >= goal else ""
        cells = ["not reached"] * 3
        if np.isfinite(at):
            cells = [f"{at:,.0f}", f"{first}{yardstick['nfe'].mean() / at:.1f}"]
            cells.append(f"{first}{yardstick['wall_s'].mean() / seconds:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def squared_errors(found: dict[str, Curve], name: str, budget: int) -> np.ndarray:
    """Squared errors of log Z-hat [contexts] against the other unbiased estimates of each context, pooled by nfe.

    Sums of unbiased Z-hat weighted by what they cost are unbiased, whatever made them; smc without F, whose variance is
    much larger, is left out.
    """
    others = [
        c
        for n, curve in found.items()
        for b, c in curve.items()
        if n in UNBIASED and (n, b) != (name, budget)
    ]
    log_cost = np.stack([np.log(c["nfe"]) for c in others])
    log_z = np.stack([c["log_z"] for c in others])
    pooled = np.logaddexp.reduce(log_z + log_cost) - np.logaddexp.reduce(log_cost)
    return (found[name][budget]["log_z"] - pooled) ** 2


def cost_of_error(costs: np.ndarray, errors: np.ndarray, target: float) -> float:
    """Cost at which errors [N] falling with costs [N] come down to a target, linear in logs; 0 or inf outside the curve."""
    below = np.flatnonzero(errors <= target)
    if not len(below):
        return np.inf
    i = int(below[0])
    if i == 0:
        return float(costs[0]) if errors[0] == target else 0.0
    share = np.log(errors[i - 1] / target) / np.log(errors[i - 1] / errors[i])
    return float(np.exp(np.log(costs[i - 1]) + share * (np.log(costs[i]) - np.log(costs[i - 1]))))


def errors(found: dict[str, Curve]) -> str:
    """Markdown: root mean square errors of log Z-hat, and how many times a method's nfe snis pays for as small a one."""
    costs = np.array([c["nfe"].mean() for c in found[BASE].values()])
    of_base = np.array([_summary(c, ERROR)["mean"] for c in found[BASE].values()])
    lines = [
        "| method | rollouts | nfe | RMSE of log Ẑ | ESS | nfe of snis / nfe |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, curve in found.items():
        for budget, columns in curve.items():
            if np.isnan(columns["log_z"]).any():
                continue
            rmse = _summary(columns, ERROR)
            nfe = columns["nfe"].mean()
            needed = cost_of_error(costs, of_base, rmse["mean"])
            ratio = f"< {costs[0] / nfe:.1f}" if needed == 0 else f"{needed / nfe:.1f}"
            ratio = f"> {costs[-1] / nfe:.1f}" if np.isinf(needed) else ratio
            interval = f"{rmse['mean']:.2f} [{rmse['low']:.2f}, {rmse['high']:.2f}]"
            lines.append(
                f"| {name} | {budget:,} | {nfe:,.0f} | {interval} | {columns['ess'].mean():.1f} | {ratio} |"
            )
    return "\n".join(lines)


def draw(found: dict[str, Curve], path: Path) -> None:
    """Every measure against nfe and against wall time."""
    figure, grid = subplots(2, len(DRAWN), figsize=(19, 8.5), layout="constrained")
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for row, (cost, unit) in zip(
        grid, (("nfe", "nfe a context"), ("wall_s", "wall time a context, s")), strict=True
    ):
        for axes, (measure, title) in zip(row, DRAWN.items(), strict=True):
            for colour, (name, curve) in zip(colours, found.items(), strict=False):
                values = [
                    _summary(c, measure) for c in curve.values() if not np.isnan(c[measure]).any()
                ]
                if not values:
                    continue
                x = [c[cost].mean() for c in curve.values()]
                mean, low, high = (
                    np.array([v[k] for v in values]) for k in ("mean", "low", "high")
                )
                style = "-o" if name in ("snis", "smc", "dts", "residual_ts") else "--s"
                axes.plot(x, mean, style, label=name, color=colour, markersize=4)
                if name in ("dts", "snis, F proposes"):
                    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.set(xscale="log", xlabel=unit, ylabel=title)
            if measure == ERROR:
                axes.set_yscale("log")
            if measure == "gap":
                axes.axhline(0, color="#888888", linewidth=0.8)
    handles, names = grid[0, -1].get_legend_handles_labels()  # CRPS, which all have
    figure.legend(handles, names, loc="outside right center", frameon=False)
    num = len(next(iter(found[BASE].values()))[ERROR])
    figure.suptitle(
        f"{num} held-out contexts, horizon 48, λ = 20; bands of two methods: 95% bootstrap over contexts"
    )
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def main() -> None:
    """Run what is missing, print the tables and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flow", help="checkpoint directory; left out, only report what is there")
    parser.add_argument("--output", type=Path, default=Path("results/amortisation"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    if arguments.flow is not None:
        run(arguments.flow, arguments.output, arguments.resume)
    found = curves(arguments.output)
    print("\n\n".join([table(found), ratios(found), errors(found)]))
    draw(found, arguments.output / "amortisation.png")


if __name__ == "__main__":
    main()
