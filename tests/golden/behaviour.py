"""Digests of what this tree does, so that a change of its structure can show that it changed nothing else.

    python -m tests.golden.behaviour            # compare with behaviour.json; exit code 1 and the names where they differ
    python -m tests.golden.behaviour --record   # write it anew (on the commit from which behaviour is to stay)
    python -m tests.golden.behaviour toys old   # some parts only

Samples, weights, rewards, estimates and bills go in, to the last bit (estimates of a fleet with a flow rounded); seconds and paths do not. What is compared was recorded on
one kind of processor: other ones may round otherwise. Files of old (tree, walks, flow) lie in `files/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import SdtError
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.search.api import run_searches
from sdt_dist.search.session import SearchProblem
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.values.files import read_evidence

HERE = Path(__file__).parent
RECORDED = HERE / "behaviour.json"
OLD = HERE / "files"
COMMAND = [sys.executable, "-m", "sdt_dist.cluster.cli"]
UNTIMED = ("wall_s", "run", "seconds")  # keys whose values are no behaviour
TOY = (5, 4, 1.0, "smooth", 5.0, 0)
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("greedy", {}),
    "sample": ("sample", {}),
    "best_of_n": ("best_of_n", {}),
    "snis": ("snis", {}),
    "beam": ("beam", {}),
    "smc": ("smc", {}),
    "mcts": ("mcts", {}),
    "dts": ("dts", {}),
    "dts blocks": ("dts", {"block_size": 2}),
    "dts multiset": ("dts", {"weights": "multiset"}),
    "dts_star": ("dts_star", {}),
    "maxent_ts": ("maxent_ts", {"expansion_k": 2}),
    "maxent_ts truncated": ("maxent_ts", {"expansion_k": 3, "tail": "truncate"}),
    "residual_ts": ("residual_ts", {}),
    "residual_ts falls": ("residual_ts", {"draw": "fall"}),
}
Found = Iterator[tuple[str, Any]]


def digest_of(value: Any) -> str:
    """A digest of arrays, numbers, texts and what holds them; floats by their bits."""
    return hashlib.blake2b(_bytes(value), digest_size=12).hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    if isinstance(value, dict):
        kept = {str(key): item for key, item in value.items() if key not in UNTIMED}
        return (
            b"{" + b"".join(key.encode() + b":" + _bytes(kept[key]) for key in sorted(kept)) + b"}"
        )
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_bytes, value)) + b"]"
    if isinstance(value, float):
        return value.hex().encode()
    return repr(value).encode()


def facts_of(result: Any) -> dict[str, Any]:
    """All of a search's result that a seed decides."""
    return {
        "samples": [
            (s.tokens, s.reward, s.log_prob, s.finish_reason, s.series) for s in result.samples
        ],
        "finished": [(s.tokens, s.reward, s.log_prob, s.components) for s in result.finished],
        "weights": result.weights,
        "estimates": (
            result.log_z,
            result.log_z_error,
            result.log_z_unbiased,
            result.ess,
            result.exhausted,
        ),
        "law": result.probabilities,
        "cost": (result.nfe, result.model_calls, result.rollouts, result.cost.reward_calls),
        "tree": None if result.tree is None else result.tree.arrays(),
        "stats": result.tree_stats,
    }


def search_toy(
    method: str, options: dict[str, Any], seed: int, resume: Snapshot | None = None
) -> Any:
    """A search of the toy."""
    model = Toy(*TOY)
    top_k = options["expansion_k"] if options.get("tail") == "truncate" else None
    process = TokenProcess(model, replace(model.law, top_k=top_k), model.length)
    problem = SearchProblem(0, process.root([0]), model)
    settings = {"inverse_temperature": 5.0} | options
    ((_, outcome),) = run_searches(
        process, [problem], method=method, options=settings, seed=seed, resume=resume
    )
    if isinstance(outcome, SdtError):
        raise outcome
    return outcome


def toys(folder: Path) -> Found:
    """Every method on a toy."""
    for name, (method, options) in SEARCHES.items():
        yield (
            name,
            [
                facts_of(search_toy(method, options | {"num_rollouts": 60}, seed))
                for seed in range(3)
            ],
        )


def old(folder: Path) -> Found:
    """Files that an earlier tree wrote: a saved search goes on, walks are read, a flow proposes."""
    saved = Snapshot.load(OLD / "residual_ts.npz")
    yield (
        "a saved search goes on",
        facts_of(search_toy("residual_ts", {"num_rollouts": 60}, 3, saved)),
    )
    for key, (walks, closed) in read_evidence(OLD / "walks.npz").items():
        yield "walks", [key, closed, [asdict(walk) for walk in walks]]
    yield "a flow proposes", forecast(folder, "old", "s_adt", 12, "--flow", OLD / "flow")


def run(*arguments: object) -> str:
    """The `sdt` command; what it printed. One thread, since their number may change bits."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "COLUMNS": "120"}
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"sdt {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return done.stdout


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file in an order that does not depend on who ended first."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(
        lines, key=lambda line: (line.get("label", ""), line.get("problem", line.get("step", 0)))
    )


def arrays_of(path: Path) -> dict[str, Any]:
    """The arrays of an .npz, and its head without what differs from run to run."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    head = json.loads(str(arrays.pop("head"))) if "head" in arrays else None
    if head is not None:
        head.get("counters", {}).pop("wall_s", None)
    return {"head": head, **arrays}


def write_series(path: Path, count: int = 400) -> Path:
    """An hourly series of a day's period as CSV."""
    rng = np.random.default_rng(5)
    values = 10 + 3 * np.sin(np.arange(count) * 2 * np.pi / 24) + rng.normal(0, 0.3, count)
    stamps = np.datetime64("2024-01-01T00") + np.arange(count).astype("timedelta64[h]")
    rows = [f"{stamp},{value:.6f}" for stamp, value in zip(stamps, values, strict=True)]
    path.write_text("\n".join(["date,load", *rows]) + "\n", encoding="utf-8")
    return path


def forecast(folder: Path, name: str, method: str, horizon: int, *more: object) -> str:
    """What `sdt forecast` writes."""
    series = write_series(folder / "load.csv")
    output = folder / f"{name}.csv"
    run(
        "forecast", series, "--horizon", horizon, "--method", method, "--rollouts", 40, "--num-samples", 20, "--seed", 3,
        "--reward", "spectral:gamma=1", "--inverse-temperature", 3, "--output", output, *more,
    )  # fmt: skip
    return output.read_text(encoding="utf-8")


def forecasts(folder: Path) -> Found:
    """`sdt forecast` in one process."""
    for method in ("snis", "residual_ts", "smc"):
        yield method, forecast(folder, method, method, 24)


def quickstart(folder: Path) -> Found:
    """The main job, on a fleet of this machine: samples, summary and saved trees."""
    output = folder / "quickstart"
    run("evaluate", "--output", output)
    for line in lines_of(output / "samples.jsonl"):
        yield f"{line['label']} {line['problem']}", line
    summary = json.loads((output / "summary.json").read_text())
    yield (
        "summary",
        {m: {k: v for k, v in row.items() if k != "wall_s"} for m, row in summary.items()},
    )
    yield "problems", json.loads((output / "problems.json").read_text())
    yield "truth", json.loads((output / "truth.json").read_text())
    for path in sorted((output / "trees").glob("*.npz")):
        yield f"tree {path.stem}", arrays_of(path)


def coarse(line: dict[str, Any]) -> dict[str, Any]:
    """A result line whose estimates are rounded where a flow proposed.

    F of a state depends on its batch in the seventh digit, and batches of a fleet on timing.
    """
    if line.get("flow") is None:
        return line
    estimates = {name: line[name] for name in ("log_z", "log_z_error", "ess")}
    rounded = {name: f"{value:.4g}" for name, value in estimates.items() if value is not None}
    return line | rounded


def fleets(folder: Path) -> Found:
    """Evaluations with a flow, an ablation and kept walks, then a flow trained on their trees."""
    output = folder / "fleet"
    run(
        "evaluate", "--output", output, "--methods", "snis,snis+flow,smc+flow,s_adt,residual_ts", "--flow", "bundled",
        "--horizon", 48, "--inverse-temperature", 20, "--num-problems", 2, "--rollouts", 20, "--seed", 1,
    )  # fmt: skip
    for line in lines_of(output / "samples.jsonl"):
        yield f"{line['label']} {line['problem']}", coarse(line)
    ablation = folder / "ablation"
    run(
        "evaluate", "--output", ablation, "--methods", "residual_ts,dts", "--ablate", "rollouts=5,10", "--ablate",
        "lambda=1,3", "--num-problems", 2, "--horizon", 12,
    )  # fmt: skip
    for line in lines_of(ablation / "samples.jsonl"):
        yield f"{line['label']} {line['problem']}", line
    flow = folder / "flow"
    run(
        "train-flow", "--trees", ablation, "--output", flow, "--rounds", 2, "--steps-per-round", 6, "--hidden-size", 16,
        "--num-children", 8, "--set", "save_every=3",
    )  # fmt: skip
    yield "a flow's losses", lines_of(flow / "losses.jsonl")
    yield "a flow's weights", (flow / "model.safetensors").read_bytes()


def sweeps(folder: Path) -> Found:
    """A sweep with one trial at a time, which is repeatable."""
    settings = folder / "sweep.yaml"
    settings.write_text(
        "evaluation: {dataset: co2, num_problems: 2, horizon: 8, context_length: 64, num_samples: 6}\n"
        "methods: [snis, residual_ts]\n"
        "space: {inverse_temperature: {low: 1, high: 30, log: true}, epsilon: {low: 0.1, high: 0.5}}\n"
        "rungs: [3, 6]\nscheduler: none\nnum_trials: 4\nmax_concurrent: 1\n",
        encoding="utf-8",
    )
    run("tune", settings, "--output", folder / "sweep")
    yield "trials", (folder / "sweep" / "trials.jsonl").read_text(encoding="utf-8")


def trainings(folder: Path) -> Found:
    """A forecaster fine-tuned for some steps on one thread."""
    series = write_series(folder / "longer.csv", 1000)
    output = folder / "forecaster"
    run(
        "train-forecaster", "--init", "bundled", "--data", series, "--output", output, "--steps", 3, "--batch-size", 4,
    )  # fmt: skip
    yield "weights", (output / "model.safetensors").read_bytes()


PARTS: dict[str, Callable[[Path], Found]] = {
    part.__name__: part for part in (toys, old, forecasts, quickstart, fleets, sweeps, trainings)
}


def measured(names: list[str]) -> dict[str, dict[str, str]]:
    """{part: {what: digest}} of some parts."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict[str, str]] = {}
        for name in names:
            found[name] = {what: digest_of(value) for what, value in PARTS[name](Path(folder))}
            print(f"{name}: {len(found[name])} digests", flush=True)
        return found


def main(arguments: list[str]) -> int:
    """Compare or record; the exit code."""
    record = "--record" in arguments
    names = [name for name in arguments if not name.startswith("--")] or list(PARTS)
    have = measured(names)
    want = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    if record:
        RECORDED.write_text(json.dumps(want | have, indent=1) + "\n", encoding="utf-8")
        return 0
    differ = [
        f"{part}: {what}"
        for part in names
        for what in sorted(want[part].keys() | have[part].keys())
        if want[part].get(what) != have[part].get(what)
    ]
    print("\n".join(f"differs  {name}" for name in differ) or "same behaviour")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
