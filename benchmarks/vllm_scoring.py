"""What reduced rows cost in vLLM, whose engine computes in a process of its own (SPEC section 3).

    python -m benchmarks.vllm_scoring [--hidden N] [--repetitions N]      (in the environment of `make test-vllm`)

Workload: a randomly initialised Llama with a vocabulary of 128,256, 16 prompts of 96 cached tokens and one new one. The
yardstick is one-token generation on the same engine, drawn from p with per-request seeds, as anyone would ask vLLM for
it; and greedy, which reads the row once. Against them: an expansion (the 8 best, or a Gumbel-top-8 with a key, with log
p, residual mass and count), and the one-token rollout. All take turns; medians and ratios of medians.
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

from sdt_dist.models.process import prompt_digest
from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest, Root

if TYPE_CHECKING:
    from sdt_dist.models.vllm.model import VllmModel

VOCABULARY, PROMPTS, LENGTH, CHILDREN = 128_256, 16, 96, 8
LAW = PriorLaw((0, VOCABULARY))


def build(folder: str, hidden: int) -> None:
    """Save the workload's model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def raw(model: VllmModel, roots: list[Root], temperature: float) -> Callable[[int], None]:
    """One-token generation of all prompts by vLLM itself, without our logits processor's work."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    async def one(root: Root, name: str, seed: int) -> None:
        parameters = SamplingParams(
            max_tokens=1, temperature=temperature, seed=seed if temperature else None, detokenize=False, ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        async for _ in model.engine.llm.generate(tokens_input([*root.prompt, 5]), parameters, request_id=name):
            pass

    async def all_of(turn: int) -> None:
        await asyncio.gather(*(one(r, f"raw {temperature} {turn} {i}", turn + i) for i, r in enumerate(roots)))

    return lambda turn: model.engine.wait(all_of(turn))


def contenders(model: VllmModel, roots: list[Root]) -> dict[str, Callable[[int], object]]:
    """Everything that takes a turn, by name; the yardsticks first."""
    return {
        "generate (drawn)": raw(model, roots, 1.0),
        "generate (greedy)": raw(model, roots, 0.0),
        "expand, top 8": lambda turn: model.expand([ExpandRequest(r, (5,), CHILDREN) for r in roots], LAW),
        "expand, Gumbel-top-8": lambda turn: model.expand(
            [ExpandRequest(r, (5,), CHILDREN, turn + i) for i, r in enumerate(roots)], LAW
        ),
        "rollout of one token": lambda turn: model.rollout(
            [RolloutRequest(r, (5,), 1, turn + i) for i, r in enumerate(roots)], LAW
        ),
    }


def measure(hidden: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every contender's turns."""
    from sdt_dist.models.vllm.loading import open_model  # here, as the engine's process imports this module once more

    with tempfile.TemporaryDirectory() as folder:
        build(folder, hidden)
        model = open_model(Path(folder))
        rng = np.random.default_rng(0)
        prompts = [tuple(rng.integers(0, VOCABULARY, LENGTH).tolist()) for _ in range(PROMPTS)]
        turns = contenders(model, [Root(prompt, prompt_digest(prompt)) for prompt in prompts])
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(-3, repetitions):
            for name, run in turns.items():
                begin = time.perf_counter()
                run(1000 + turn)
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - begin)
        model.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--repetitions", type=int, default=40)
    asked = parser.parse_args()
    seconds = measure(asked.hidden, asked.repetitions)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    drawn, greedy = list(medians.values())[:2]
    table = Table(
        "16 prompts, one token", "ms (median)", "over drawn", "over greedy", box=box.SIMPLE,
        title=f"V = {VOCABULARY}, hidden {asked.hidden}",
    )  # fmt: skip
    for name, value in medians.items():
        table.add_row(name, f"{1e3 * value:.1f}", f"{value / drawn:.3f}", f"{value / greedy:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
