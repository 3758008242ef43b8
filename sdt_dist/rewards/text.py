"""Rewards of texts: patterns, answers, length, and a reward model (docs/guides/rewards.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import CheckpointError, ConfigurationError, RewardError
from sdt_dist.protocols import Decoded
from sdt_dist.rewards.base import Reward, view_of


class Regex(Reward):
    """1 where the pattern is found in the text, else 0."""

    multipliers = {"regex": 1.0}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(
                f"regex: {pattern!r} is not a valid pattern ({error})."
            ) from error

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        texts = view_of(samples, "text")
        return {"regex": np.array([float(self.pattern.search(text) is not None) for text in texts])}


class Answer(Reward):
    """1 where the text, without surrounding blanks and case, equals the answer."""

    multipliers = {"answer": 1.0}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, text: str) -> None:
        self.text = text.strip().casefold()

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        texts = view_of(samples, "text")
        return {"answer": np.array([float(text.strip().casefold() == self.text) for text in texts])}


class Length(Reward):
    """Minus the distance of the number of tokens from a target, as a share of the target."""

    multipliers = {"length": 1.0}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, target: float) -> None:
        if not 0 < target < np.inf:
            raise ConfigurationError(f"length: target={target}, must be finite and > 0.")
        self.target = target

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        counts = np.array([len(sample.tokens) for sample in samples], dtype=np.float64)
        return {"length": -np.abs(counts - self.target) / self.target}


class RewardModel(Reward):
    """The one output of a Transformers sequence-classification model on prompt + text.

    model: a directory or hub id with safetensors weights; code from the hub never runs. It loads at the first scoring,
    once a process, on CUDA where there is one and else on the CPU in float32. prompt: what the answers continue.
    batch_size: texts a forward pass. Raises ConfigurationError or CheckpointError for a model that cannot be used, and
    RewardError for texts beyond its length.
    """

    multipliers = {"reward_model": 1.0}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, model: str, prompt: str | None, batch_size: int = 16) -> None:
        if prompt is None:
            raise ConfigurationError(
                "reward_model: needs the prompt as text; forecasts and token ids have none."
            )
        directory = Path(model)
        if not directory.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
            raise ConfigurationError(
                f"reward_model: {model!r} is neither a directory nor a hub id 'owner/name'."
            )
        if directory.is_dir() and not list(directory.glob("*.safetensors")):
            raise CheckpointError(
                f"reward_model: {model} holds no .safetensors weights; pickles are refused."
            )
        self.model = model
        self.prompt = prompt
        self.batch_size = batch_size

    def components(self, samples: Sequence[Decoded]) -> dict[str, np.ndarray]:
        tokenizer, module = _load_scorer(self.model)
        texts = [self.prompt + text for text in view_of(samples, "text")]
        size = 1 if tokenizer.pad_token_id is None else self.batch_size
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        return {
            "reward_model": np.concatenate(
                [np.zeros(0), *(_outputs(tokenizer, module, b) for b in batches)]
            )
        }


def _outputs(tokenizer: Any, module: Any, texts: list[str]) -> np.ndarray:
    """The model's output [B] for texts, padded on the right: positions of real tokens do not move."""
    import torch

    batch = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, padding_side="right")
    ids, mask = (batch[name].to(module.device) for name in ("input_ids", "attention_mask"))
    limit = min(
        tokenizer.model_max_length, getattr(module.config, "max_position_embeddings", ids.shape[1])
    )
    if ids.shape[1] > limit:
        raise RewardError(
            f"reward_model: prompt and answer have {ids.shape[1]} tokens, allowed: {limit}."
        )
    with torch.inference_mode():
        return module(input_ids=ids, attention_mask=mask).logits[:, 0].double().cpu().numpy()


@cache
def _load_scorer(name: str) -> tuple[Any, Any]:
    """(tokenizer, module) of a reward model, shared by all problems of a process."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        module, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32 if device == "cpu" else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"reward_model: {name!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    if module.config.num_labels != 1:
        raise ConfigurationError(
            f"reward_model: {name!r} has {module.config.num_labels} outputs, allowed: 1."
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise CheckpointError(
            f"reward_model: {name!r} lacks the weights {missing!r}; it is no trained reward model."
        )
    if tokenizer.pad_token_id is not None:
        # where causal models look for the last real token
        module.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, module.to(device).eval()
