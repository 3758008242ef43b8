"""The Python entry points: search one prompt, or many problems together (SPEC section 9)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import SdtError
from sdt_dist.protocols import Process, Root
from sdt_dist.search.driver import Progress, drive
from sdt_dist.search.methods import get_method, validate_options
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem, Session
from sdt_dist.search.snapshot import Snapshot

IN_FLIGHT = 64


def method_options(name: str) -> type[SearchOptions]:
    """The pydantic model of a method's options: field names, types, defaults and descriptions."""
    return get_method(name).options


def run_searches(
    process: Process,
    problems: Sequence[SearchProblem],
    *,
    method: str,
    options: dict[str, Any],
    seed: int,
    in_flight: int = IN_FLIGHT,
    on_progress: Progress | None = None,
    resume: Snapshot | None = None,
) -> Iterator[tuple[int, SearchResult | SdtError]]:
    """Search many problems with one method, merging their model requests; yields each as it ends.

    Yields (problem index, SearchResult), or (problem index, error) for a problem whose reward or context failed.
    Results do not depend on which problems run together. `resume` goes on with one problem's saved search. ConfigurationError comes before any model call.
    """
    chosen = get_method(method)
    checked = validate_options(method, options)

    def start() -> Iterator[tuple[Session, Any]]:
        for given in problems:
            problem = replace(given, root=_own_root(given))
            session = Session(problem, process, checked, seed, resumed=resume)
            if resume is not None:
                resume.check(session.header(method))
            yield session, chosen.run(session)

    return drive(process, start(), in_flight=in_flight, on_progress=on_progress)


def _own_root(problem: SearchProblem) -> Root:
    """The problem's root under a digest of its own: caches are per problem, so no companion changes what it costs."""
    digest = hashlib.blake2b(problem.root.digest + problem.index.to_bytes(8, "little"), digest_size=16).digest()
    return replace(problem.root, digest=digest)


def search(
    model: Any,
    prompt: str | Sequence[int] | np.ndarray,
    reward: Any,
    *,
    method: str = "residual_ts",
    max_new_tokens: int = 32,
    sampling_temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    resume: Snapshot | str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> SearchResult:
    """Samples of p(x|prompt) exp(lambda r(x)) by one method.

    model: from `load_model`, or any object with `LLMInterface`. prompt: a string or token ids for language models, a
    1-D float array (the history) for forecasters, whose horizon is max_new_tokens. reward: a Reward, or a callable
    that takes a list of finished samples (token lists, generated part only; arrays [B, horizon] for forecasters)
    and returns floats. options: the method's (num_rollouts, inverse_temperature, num_samples, wave_size, ...).
    resume: a tree method's saved search of the same prompt and reward, to go on with up to a larger budget.
    Raises ConfigurationError, ContextError or RewardError; nothing is computed before options are checked.
    """
    from sdt_dist.models.interface import interface_process
    from sdt_dist.rewards.base import as_reward

    validate_options(method, options)
    law = {"sampling_temperature": sampling_temperature, "top_k": top_k, "top_p": top_p}
    process = (
        model.process(max_new_tokens, **law)
        if hasattr(model, "process")
        else interface_process(model, max_new_tokens, **law)
    )
    default_view = "series" if getattr(model, "is_forecaster", False) else "tokens"
    problem = SearchProblem(0, process.root(prompt), as_reward(reward, default_view))
    ((_, outcome),) = run_searches(
        process,
        [problem],
        method=method,
        options=options,
        seed=seed,
        on_progress=on_progress,
        resume=Snapshot.load(resume) if isinstance(resume, (str, Path)) else resume,
    )
    if isinstance(outcome, SdtError):
        raise outcome
    return outcome
