"""Speed of tree search against `generate`: CPU seconds a prompt on one thread.

See docs/concepts/target.md#methods, docs/architecture/search.md.

    python -m benchmarks.decoding [--repetitions N] [--output FILE]

Workload: a randomly initialised Llama of 1.5 M parameters without end tokens, 20 rollouts of 36 new tokens. The
yardsticks are Transformers' `generate` of 20 equal rows, and `shared`, the same with the prompt encoded once.
`maxent_ts` and `dts` search in waves of 5, one prompt alone or 16 together. Yardsticks and methods take turns; each
repetition has its own prompts and seeds, so nothing cached earlier helps; the best repetition counts, for all alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sdt_dist.errors import SdtError
from sdt_dist.files import write_text
from sdt_dist.models.hf.model import HFModel
from sdt_dist.models.process import TokenProcess
from sdt_dist.protocols import PriorLaw
from sdt_dist.rewards.base import as_reward
from sdt_dist.search.api import run_searches
from sdt_dist.search.session import SearchProblem

VOCABULARY = 4096
NEW_TOKENS = 36
ROWS = 20
REPETITIONS = 5
SEARCH = {"num_rollouts": ROWS, "wave_size": 5}
METHODS: dict[str, dict[str, Any]] = {"maxent_ts": SEARCH | {"expansion_k": 4}, "dts": SEARCH}
YARDSTICKS = ("generate", "shared")

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts of one length searched together, and the most that a method may take per prompt, over `generate`."""

    name: str
    prompt_tokens: int
    num_prompts: int
    target: float


CASES = (Case("a", 64, 1, 1.5), Case("a16", 64, 16, 0.4), Case("b", 1024, 1, 0.5))


def build_module() -> LlamaForCausalLM:
    """The workload's model: float32, seeded, without end, begin or padding tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def generate(module: LlamaForCausalLM, prompts: Prompts, *, shared: bool) -> None:
    """Sample ROWS answers to each prompt from the whole vocabulary; `shared` encodes a prompt once for all rows."""
    for prompt in prompts:
        ids = torch.tensor([prompt])
        extra = {"past_key_values": _prefill(module, ids)} if shared else {}
        rows = module.generate(
            ids.repeat(ROWS, 1),
            attention_mask=torch.ones(ROWS, len(prompt), dtype=torch.int64),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            **extra,
        )
        assert rows.shape == (ROWS, len(prompt) + NEW_TOKENS)


@torch.inference_mode()
def _prefill(module: LlamaForCausalLM, ids: torch.Tensor) -> DynamicCache:
    """A cache of ROWS rows with all of the prompt but its last token, which `generate` feeds itself."""
    cache = DynamicCache(config=module.config)
    module(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(ROWS)
    return cache


def mean_token(answers: Sequence[Sequence[int]]) -> list[float]:
    """A cheap reward in [0, 1]."""
    return [sum(tokens) / (len(tokens) * VOCABULARY) for tokens in answers]


def search_all(process: TokenProcess, prompts: Prompts, method: str, seed: int) -> None:
    """Search all prompts together; raises what a search raised."""
    reward = as_reward(mean_token, "tokens")
    problems = [SearchProblem(i, process.root(prompt), reward) for i, prompt in enumerate(prompts)]
    for _, outcome in run_searches(
        process, problems, method=method, options=METHODS[method], seed=seed
    ):
        if isinstance(outcome, SdtError):
            raise outcome
        assert outcome.cost.rollouts == ROWS


def cpu_s(work: Callable[[], None]) -> float:
    """CPU seconds of this process, all its threads together."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(
    module: LlamaForCausalLM, process: TokenProcess, repetition: int
) -> dict[tuple[str, str], float]:
    """CPU seconds a prompt of every (case, subject); yardsticks take one prompt even where a case has 16."""
    rng = np.random.default_rng(repetition)
    found = {}
    for case in CASES:
        for shared, name in enumerate(YARDSTICKS):
            prompts = rng.integers(0, VOCABULARY, (1, case.prompt_tokens)).tolist()
            found[case.name, name] = cpu_s(
                lambda p=prompts, s=bool(shared): generate(module, p, shared=s)
            )
        for method in METHODS:
            prompts = rng.integers(0, VOCABULARY, (case.num_prompts, case.prompt_tokens)).tolist()
            taken = cpu_s(lambda p=prompts, m=method: search_all(process, p, m, repetition))
            found[case.name, method] = taken / case.num_prompts
    return found


def summarise(measured: list[dict[tuple[str, str], float]]) -> list[dict[str, Any]]:
    """One record per case and subject: its best repetition, ratios to both yardsticks' best, and the verdict."""
    best = {key: min(repetition[key] for repetition in measured) for key in measured[0]}
    records = []
    for case in CASES:
        plain, shared = (best[case.name, name] for name in YARDSTICKS)
        for subject in (*YARDSTICKS, *METHODS):
            taken = best[case.name, subject]
            record = {
                "case": case.name,
                "prompt_tokens": case.prompt_tokens,
                "num_prompts": case.num_prompts,
            }
            record |= {
                "subject": subject,
                "cpu_s": taken,
                "to_generate": taken / plain,
                "to_shared": taken / shared,
            }
            if subject in METHODS:
                record |= {"target": case.target, "met": taken / plain <= case.target}
            records.append(
                record
                | {"repetitions": [repetition[case.name, subject] for repetition in measured]}
            )
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """The records for a terminal."""
    title = f"CPU seconds a prompt: {ROWS} rollouts of {NEW_TOKENS} tokens, waves of {SEARCH['wave_size']}, one thread"
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("case", "prompts", "subject"):
        shown.add_column(column, no_wrap=True)
    for column in ("CPU s", "/generate", "/shared", "at most"):
        shown.add_column(column, justify="right", no_wrap=True)
    for r in records:
        target = f"{r['target']} {'met' if r['met'] else 'NOT met'}" if "target" in r else ""
        prompts = f"{r['num_prompts'] if target else 1} of {r['prompt_tokens']}"
        numbers = (f"{r['cpu_s']:.3f}", f"{r['to_generate']:.2f}", f"{r['to_shared']:.2f}")
        last = r["subject"] == [*METHODS][-1]
        shown.add_row(r["case"], prompts, r["subject"], *numbers, target, end_section=last)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of tree search against generate.")
    parser.add_argument(
        "--repetitions", type=int, default=REPETITIONS, help="the best of these counts"
    )
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    module = build_module()
    process = TokenProcess(HFModel(module), PriorLaw((0, VOCABULARY)), NEW_TOKENS)
    torch.manual_seed(1)
    measure(module, process, arguments.repetitions)  # warm-up: compilation, lazy imports
    records = summarise(
        [measure(module, process, repetition) for repetition in range(arguments.repetitions)]
    )
    Console().print(table(records))
    if arguments.output is not None:
        write_text(arguments.output, json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
