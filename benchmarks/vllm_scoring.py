"""What reduced rows cost in vLLM, whose engine computes in a process of its own.

See docs/architecture/search.md.

    python -m benchmarks.vllm_scoring [--hidden N]                        (in the environment of `make test-vllm`)
    python -m benchmarks.vllm_scoring --vocabulary 1024 --rows 128 --tokens 96

Workload: a randomly initialised Llama with a vocabulary of 128,256, 16 prompts of 96 cached tokens, and one new token a
row. The yardsticks are vLLM's own generation on the same engine: drawn from p with per-request seeds, as anyone would ask
for it, and greedy, which reads a row once. Against them: an expansion (the 8 best, or a Gumbel-top-8 with a key, with log
p, residual mass and count; of one token only), and a rollout. All take turns; medians and ratios of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest, Root, prompt_digest

if TYPE_CHECKING:
    from sdt_dist.models.vllm.model import VllmModel

PROMPTS = 16
LENGTH = 96
CHILDREN = 8


def build(folder: str, vocabulary: int, hidden: int) -> None:
    """Save the workload's model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def raw(
    model: VllmModel, roots: list[Root], temperature: float, tokens: int
) -> Callable[[int], None]:
    """Generation of all rows by vLLM itself, without our logits processor's work."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    async def one(root: Root, name: str, seed: int) -> None:
        parameters = SamplingParams(
            max_tokens=tokens, temperature=temperature, seed=seed if temperature else None, detokenize=False, ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        async for _ in model.engine.llm.generate(
            tokens_input([*root.prompt, 5]), parameters, request_id=name
        ):
            pass

    async def all_of(turn: int) -> None:
        await asyncio.gather(
            *(one(r, f"raw {temperature} {turn} {i}", turn + i) for i, r in enumerate(roots))
        )

    return lambda turn: model.engine.wait(all_of(turn))


def contenders(
    model: VllmModel, roots: list[Root], tokens: int
) -> dict[str, Callable[[int], object]]:
    """Everything that takes a turn, by name; the yardsticks first."""
    law = PriorLaw((0, model.vocab_size))
    found: dict[str, Callable[[int], object]] = {
        "generate (drawn)": raw(model, roots, 1.0, tokens),
        "generate (greedy)": raw(model, roots, 0.0, tokens),
        "rollout": lambda turn: model.rollout(
            [RolloutRequest(r, (5,), tokens, 1000 * turn + i) for i, r in enumerate(roots)], law
        ),
    }
    if tokens == 1:
        found["expand, top 8"] = lambda turn: model.expand(
            [ExpandRequest(r, (5,), CHILDREN) for r in roots], law
        )
        found["expand, Gumbel-top-8"] = lambda turn: model.expand(
            [ExpandRequest(r, (5,), CHILDREN, 1000 * turn + i) for i, r in enumerate(roots)], law
        )
    return found


def measure(asked: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every contender's turns."""
    # here: vLLM is not where the other benchmarks run
    from sdt_dist.models.vllm.loading import (
        open_model,
    )

    with tempfile.TemporaryDirectory() as folder:
        build(folder, asked.vocabulary, asked.hidden)
        model = open_model(Path(folder))
        rng = np.random.default_rng(0)
        prompts = [
            tuple(rng.integers(0, asked.vocabulary, LENGTH).tolist()) for _ in range(PROMPTS)
        ]
        roots = [Root(prompt, prompt_digest(prompt)) for prompt in prompts]
        turns = contenders(model, [roots[i % PROMPTS] for i in range(asked.rows)], asked.tokens)
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(-2, asked.repetitions):
            for name, run in turns.items():
                begin = time.perf_counter()
                run(1000 + turn)
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - begin)
        model.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hidden", type=int, default=512, help="width of the model, a multiple of 64"
    )
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument(
        "--rows", type=int, default=16, help="rows of a call, spread over 16 prompts"
    )
    parser.add_argument("--tokens", type=int, default=1, help="new tokens a row")
    parser.add_argument("--repetitions", type=int, default=40)
    asked = parser.parse_args()
    medians = {name: statistics.median(values) for name, values in measure(asked).items()}
    drawn, greedy = list(medians.values())[:2]
    table = Table(
        f"{asked.rows} rows, {asked.tokens} tokens", "ms (median)", "over drawn", "over greedy", box=box.SIMPLE,
        title=f"V = {asked.vocabulary:,}, hidden {asked.hidden}",
    )  # fmt: skip
    for name, value in medians.items():
        table.add_row(name, f"{1e3 * value:.1f}", f"{value / drawn:.3f}", f"{value / greedy:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
