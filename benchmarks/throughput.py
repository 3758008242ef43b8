"""Tokens a second inside a `dts` search over raw batched generation by the same backend in the same run.

See docs/architecture/search.md.

    SDT_DATA_DIR=... python -m benchmarks.throughput [--model hf:bundled] [--rounds 8] [--output FILE]
    python -m benchmarks.throughput --model random           # the Llama of benchmarks.decoding, a vocabulary of 4,096
    SDT_DATA_DIR=... python -m benchmarks.throughput --fleet  # and one model server with one searcher on local Ray

Search: 16 problems together (ETTh1 windows for a forecaster, random tokens for a language model), waves of at most 8,
at least 8 waves (rounds) each. Its tokens are those that its model calls generated; its seconds are all of it, from
the first prompt to the last result: model, tree, selection, rewards, backups, final draws.

Raw: every model call of that search again as `rollout` from fresh roots of the same prompts, and nothing else: the same
number of rows of the same prompts, each with as many tokens as its row in the search generated. Search rows start at leaves
of different depth, so they are shorter there, and their known prefix comes from the cache or is fed again; raw rows have
no prefix. Both sides encode each prompt once, in their first call. Raw answers each call just after the search did, with
the search's clock stopped, so that both meet the same load; what raw generated is forgotten, and its prompts encoded again,
with both clocks stopped. A ratio is of one whole search.

The first token of a raw row costs no forward pass, because p after the prompt is kept, while a search row below the root
pays one for each of its tokens; and draws of one token, which a search needs where a child may be full, cost raw nothing
at all. So `distributions/s`, next-token distributions computed (nfe) a second, compares like work, and the ratio of
tokens/s, for which the target is, is the stricter of the two. CPU seconds are those of this process: beside other jobs they
are steadier than wall time, and they say nothing of a backend that computes elsewhere (vLLM, a GPU). A fleet is timed in
its steady state, without its start, against raw calls that follow it, so that its ratio has all the noise of the machine;
a searcher's two crews call with half of the problems each, and so does raw.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sdt_dist.data.problems import load_problems
from sdt_dist.errors import SdtError
from sdt_dist.files import write_text
from sdt_dist.models.loading import load_model
from sdt_dist.noise import stream_key
from sdt_dist.protocols import Rollout, RolloutRequest, Root
from sdt_dist.rewards.base import as_reward
from sdt_dist.rewards.spec import RewardContext, parse_reward
from sdt_dist.search.api import run_searches
from sdt_dist.search.session import SearchProblem

TARGET = 0.9
METHOD = "dts"
RANDOM = "random"
PARTS = ("model", "reward", "tree")
COUNTERS = ("nfe", "model_calls", "prefix_tokens", "reused_tokens")


@dataclass(frozen=True, slots=True)
class Job:
    """What is searched: contexts (a history or token ids) and their rewards over one process."""

    process: Any
    contexts: list[Any]
    rewards: list[Any]
    options: dict[str, Any]


class Row(NamedTuple):
    """One row of a `rollout` call: its prompt, how deep in the tree it started, and how many tokens it generated."""

    prompt: tuple[int, ...]
    depth: int
    tokens: int


Call = list[Row]


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds and work of one side of one search; `parts` are a search's seconds by PARTS."""

    wall_s: float
    cpu_s: float
    tokens: int
    counters: dict[str, int]
    parts: dict[str, float]

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def distributions_s(self) -> float:
        return self.counters["nfe"] / self.wall_s


class Meter:
    """Seconds and a backend's counters while it runs; it can be stopped and started again."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._at = np.zeros(0)
        self._sum = np.zeros(2 + len(COUNTERS))

    def start(self) -> None:
        self._at = self._now()

    def stop(self) -> None:
        self._sum += self._now() - self._at

    def _now(self) -> np.ndarray:
        return np.array(
            [
                time.perf_counter(),
                time.process_time(),
                *(getattr(self._model, name, 0) for name in COUNTERS),
            ]
        )

    def reading(self, tokens: int, parts: dict[str, float]) -> Reading:
        wall_s, cpu_s, *counts = self._sum.tolist()
        return Reading(
            wall_s, cpu_s, tokens, dict(zip(COUNTERS, map(int, counts), strict=True)), parts
        )


class Timed:
    """`inner` as it is; the seconds of the methods named in `parts` are added to `spent` under their part."""

    def __init__(self, inner: Any, spent: dict[str, float], parts: dict[str, str]) -> None:
        self._inner = inner
        self._spent = spent
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._run, self._parts[name], found) if name in self._parts else found

    def _run(self, part: str, method: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = method(*arguments)
        self._spent[part] += time.perf_counter() - begin
        return result


class Recorder(Timed):
    """A process that notes its rollout calls; `then` is told of each with the meter stopped."""

    def __init__(
        self, process: Any, spent: dict[str, float], meter: Meter, then: Callable[[Call], None]
    ) -> None:
        super().__init__(process, spent, {"expand": "model", "decode": "reward"})
        self.calls: list[Call] = []
        self._meter = meter
        self._then = then

    def rollout(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        replies = self._run("model", self._inner.rollout, requests)
        self._meter.stop()
        pairs = zip(requests, replies, strict=True)
        self.calls.append(
            [Row(asked.root.prompt, len(asked.tokens), len(reply.tokens)) for asked, reply in pairs]
        )
        self._then(self.calls[-1])
        self._meter.start()
        return replies


class Raw:
    """Answers calls of a search again, as rollouts from fresh roots."""

    def __init__(self, job: Job, seed: int) -> None:
        self._job = job
        self._seed = seed
        self._number = 0
        self._tokens = 0
        self._meter = Meter(job.process.model)
        self._paid = set[tuple[int, ...]]()  # prompts that a timed call encoded

    def answer(self, call: Call) -> None:
        process = self._job.process
        roots = self._roots({row.prompt for row in call})
        again = [root for prompt, root in roots.items() if prompt in self._paid]
        if again:
            process.rollout([RolloutRequest(root, (), 1, 0) for root in again])
        self._paid.update(roots)
        requests = [
            RolloutRequest(
                roots[row.prompt],
                (),
                row.tokens,
                stream_key(self._seed, "raw", self._number, place),
            )
            for place, row in enumerate(call)
        ]
        self._meter.start()
        replies = process.rollout(requests)
        self._meter.stop()
        self._number = self._number + 1
        self._tokens = self._tokens + sum(len(reply.tokens) for reply in replies)
        for root in roots.values():
            process.release(root)

    def _roots(self, prompts: set[tuple[int, ...]]) -> dict[tuple[int, ...], Root]:
        """Roots by prompt, with caches of this call's own."""
        name = f"raw/{self._number}".encode()
        roots = [
            root
            for context in self._job.contexts
            if (root := self._job.process.root(context)).prompt in prompts
        ]
        digests = [hashlib.blake2b(root.digest + name, digest_size=16).digest() for root in roots]
        return {
            root.prompt: replace(root, digest=digest)
            for root, digest in zip(roots, digests, strict=True)
        }

    def reading(self) -> Reading:
        return self._meter.reading(self._tokens, {})


def search(job: Job, seed: int) -> tuple[Reading, Reading, list[Call]]:
    """One evaluation of all problems together, the raw answers to its calls, and the calls; raises what a search raised."""
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    meter = Meter(job.process.model)
    raw = Raw(job, seed)
    process: Any = Recorder(job.process, spent, meter, raw.answer)
    rewards: list[Any] = [
        Timed(r, spent, {"components": "reward", "partial": "reward"}) for r in job.rewards
    ]
    meter.start()
    problems = [
        SearchProblem(i, process.root(context), reward)
        for i, (context, reward) in enumerate(zip(job.contexts, rewards, strict=True))
    ]
    for _, outcome in run_searches(
        process, problems, method=METHOD, options=job.options, seed=seed
    ):
        if isinstance(outcome, SdtError):
            raise outcome
        assert outcome.cost.rollouts == job.options["num_rollouts"]
    meter.stop()
    found = meter.reading(sum(row.tokens for call in process.calls for row in call), spent)
    spent["tree"] = found.wall_s - spent["model"] - spent["reward"]
    return found, raw.reading(), process.calls


def generate(job: Job, calls: Sequence[Call], seed: int) -> Reading:
    """Raw answers to the calls of a search that is over, as a searcher's two crews call: each with half of the problems."""
    raw = Raw(job, seed)
    first = {job.process.root(context).prompt for context in job.contexts[::2]}
    for call in calls:
        for crew in (True, False):
            if rows := [row for row in call if (row.prompt in first) == crew]:
                raw.answer(rows)
    return raw.reading()


def on_fleet(job: Job, load: Callable[[], Any], seed: int, alone: Reading) -> Reading:
    """As `search`, on one model server and one searcher that make the same search, `alone` in one process, three times.

    From when the first of its problems are over, which warm everything up, to when as many again are; the third time
    keeps both crews at work until then. Tokens are in proportion to nfe.
    """
    import ray

    from sdt_dist.actors.config import fleet_config
    from sdt_dist.actors.fleet import run_fleet
    from sdt_dist.actors.work import GivenReward, Work

    count = len(job.contexts)
    work = [
        Work(
            f"{place}/{i}",
            i,
            job.contexts[i],
            GivenReward(job.rewards[i]),
            METHOD,
            job.options,
            seed,
        )
        for place in range(3)
        for i in range(count)
    ]
    config = fleet_config(
        {"problems_per_searcher": count, "server_threads": torch.get_num_threads()}
    )
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        namespace="sdt-benchmark",
        log_to_driver=False,
    )
    ended = list[float]()
    nfe = list[int]()
    try:
        outcomes: Any = run_fleet(work, config, load, max_new_tokens=job.process.max_new_tokens)
        with closing(outcomes):
            for _, outcome in islice(outcomes, 2 * count):
                if isinstance(outcome, SdtError):
                    raise outcome
                ended.append(time.perf_counter())
                nfe.append(outcome.cost.nfe)
    finally:
        ray.shutdown()
    paid = sum(nfe[count:])
    tokens = round(alone.tokens * paid / alone.counters["nfe"])
    return Reading(ended[-1] - ended[count - 1], np.nan, tokens, {"nfe": paid}, {})


def mean_token(vocabulary: int, answers: Sequence[Sequence[int]]) -> list[float]:
    """A cheap reward in [0, 1]."""
    return [sum(tokens) / (max(len(tokens), 1) * vocabulary) for tokens in answers]


def make_job(loaded: Any, arguments: argparse.Namespace) -> Job:
    """The problems of a loaded model: ETTh1 windows with a spectral reward, or random prompts with `mean_token`."""
    process = loaded.process(arguments.horizon)
    rng = np.random.default_rng(0)
    if getattr(loaded, "is_forecaster", False):
        windows = load_problems(
            arguments.dataset, horizon=arguments.horizon, num_problems=arguments.num_problems
        )
        factory = parse_reward(arguments.reward)
        contexts = [window.history for window in windows]
        rewards: list[Any] = [factory.build(RewardContext(history=history)) for history in contexts]
    else:
        low, high = process.law.allowed
        tokens = np.setdiff1d(np.arange(low, high), process.law.end_tokens)
        contexts = rng.choice(tokens, (arguments.num_problems, arguments.prompt_tokens)).tolist()
        rewards = [as_reward(partial(mean_token, high), "tokens")] * arguments.num_problems
    options = {
        "num_rollouts": arguments.rounds * arguments.wave_size,
        "wave_size": arguments.wave_size,
    }
    options |= {"inverse_temperature": arguments.inverse_temperature, "num_samples": 50}
    return Job(process, contexts, rewards, options | json.loads(arguments.options))


def save_random(directory: Path) -> None:
    """The randomly initialised Llama of `benchmarks.decoding` with a word tokenizer, saved as a hub model is."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from benchmarks.decoding import VOCABULARY, build_module
    from sdt_dist.models.hf.loading import quiet_transformers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
    with quiet_transformers():
        build_module().save_pretrained(directory)


def ratios(pairs: Sequence[tuple[Reading, Reading]]) -> dict[str, list[float]]:
    """Search over raw, by measure, one number a turn."""
    return {
        "tokens/s": [a.tokens_s / b.tokens_s for a, b in pairs],
        "tokens/CPU s": [a.tokens / a.cpu_s / (b.tokens / b.cpu_s) for a, b in pairs],
        "distributions/s": [a.distributions_s / b.distributions_s for a, b in pairs],
        "distributions/CPU s": [
            a.counters["nfe"] / a.cpu_s / (b.counters["nfe"] / b.cpu_s) for a, b in pairs
        ],
    }


def _spread(values: Sequence[float]) -> str:
    return (
        "–"
        if np.isnan(values).any()
        else f"{np.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
    )


def _row(label: str, pairs: Sequence[tuple[Reading, Reading]]) -> str:
    """A row of the table: medians of both sides, then of the turns' ratios with their smallest and largest."""
    sides = [[f"{np.median([getattr(pair[side], kind) for pair in pairs]):,.0f}" for side in (0, 1)]
             for kind in ("tokens_s", "distributions_s")]  # fmt: skip
    cells = [cell for pair in sides for cell in pair] + [
        _spread(values) for values in ratios(pairs).values()
    ]
    met = "met" if np.median(ratios(pairs)["tokens/s"]) >= TARGET else "NOT met"
    return f"| {label} | " + " | ".join([*cells, f">= {TARGET} {met}"]) + " |"


def describe(readings: Sequence[Reading], calls: Sequence[Call]) -> str:
    """What the search's calls looked like, how much of prefixes was cached, and where its time went."""
    rows = [len(call) for call in calls]
    long = [call for call in calls if any(row.tokens > 1 for row in call)]
    depth = float(np.mean([row.depth for call in long for row in call]))
    lines = [
        f"model calls {len(calls)}, of them {len(calls) - len(long)} of one token a row; rows a call: median "
        f"{np.median(rows):.0f}, {min(rows)} to {max(rows)}; mean depth at which longer rollouts start {depth:.2f}"
    ]
    prefix, reused = (
        sum(r.counters[name] for r in readings) for name in ("prefix_tokens", "reused_tokens")
    )
    lines.append(
        f"prefix cache: {reused / prefix:.1%} of {prefix:,} prefix tokens reused" if prefix else ""
    )
    share = {part: np.median([r.parts[part] / r.wall_s for r in readings]) for part in PARTS}
    lines.append(
        "time of the search: " + ", ".join(f"{part} {value:.1%}" for part, value in share.items())
    )
    return "\n".join(filter(None, lines))


def measure(job: Job, load: Callable[[], Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """All turns, printed as Markdown; the records for `--output`."""
    search(job, arguments.repetitions)  # warm-up: compilation, lazy imports
    pairs = list[tuple[Reading, Reading]]()
    fleet = list[tuple[Reading, Reading]]()
    calls = list[Call]()
    for turn in range(arguments.repetitions):
        found, raw, calls = search(job, turn)
        pairs.append((found, raw))
        if arguments.fleet:
            fleet.append((on_fleet(job, load, turn, found), generate(job, calls, turn)))
    columns = [
        "where",
        "tokens/s",
        "raw",
        "distributions/s",
        "raw",
        *(f"ratio {name}" for name in ratios(pairs)),
    ]
    print("| " + " | ".join([*columns, "target"]) + " |\n|---|" + "---:|" * len(columns))
    print(_row("one process", pairs))
    if fleet:
        print(_row("local fleet, 1x1", fleet))
    print("\n" + describe([found for found, _ in pairs], calls))
    return {
        "pairs": [[asdict(r) for r in pair] for pair in pairs],
        "fleet": [[asdict(r) for r in p] for p in fleet],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="hf:bundled",
        help=f"MODEL SPEC; {RANDOM!r} in it is a random small Llama",
    )
    parser.add_argument("--rounds", type=int, default=8, help="waves of every problem")
    parser.add_argument("--wave-size", type=int, default=8)
    parser.add_argument("--num-problems", type=int, default=16, help="problems together")
    parser.add_argument("--horizon", type=int, default=96, help="tokens of an answer")
    parser.add_argument(
        "--prompt-tokens", type=int, default=64, help="length of a language model's random prompts"
    )
    parser.add_argument("--dataset", default="etth1", help="a forecaster's data")
    parser.add_argument(
        "--reward", default="0.1*spectral+spectral:distance=wasserstein", help="a forecaster's"
    )
    parser.add_argument("--inverse-temperature", type=float, default=20.0)
    parser.add_argument(
        "--options",
        default="{}",
        help=f'more options of {METHOD} as JSON, such as {{"growth": 1.0}}',
    )
    parser.add_argument("--repetitions", type=int, default=5, help="turns")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument(
        "--fleet", action="store_true", help="also on local Ray (a model on the CPU)"
    )
    parser.add_argument("--output", type=Path, help="write the readings as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="sdt-random-") as folder:
        spec = arguments.model
        if spec.rpartition(":")[2] == RANDOM:
            save_random(Path(folder))
            spec = spec[: -len(RANDOM)] + folder
        loaded = load_model(spec)
        job = make_job(loaded, arguments)
        print(
            f"{arguments.model}: {len(job.contexts)} problems, {arguments.horizon} new tokens, waves of "
            f"{arguments.wave_size}, {arguments.rounds} rounds, {arguments.repetitions} turns, {arguments.threads} threads\n"
        )
        try:
            records = measure(job, partial(load_model, spec), arguments)
        finally:
            getattr(loaded.model, "close", bool)()  # engines in processes of their own
    if arguments.output is not None:
        write_text(arguments.output, json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
