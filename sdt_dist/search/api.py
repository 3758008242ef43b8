"""The Python entry points: search one prompt, or many problems together (docs/reference/cli.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sdt_dist.errors import ConfigurationError, SdtError
from sdt_dist.parts import Context, as_context
from sdt_dist.protocols import Flow, Process, States
from sdt_dist.search.driver import Progress, Search, drive
from sdt_dist.search.methods import get_method, validate_options
from sdt_dist.search.options import SearchOptions
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem, Session
from sdt_dist.search.sharing_plan import SharingPlan, check_sharing, merge_members
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.values.records import Membership

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
    sharing: SharingPlan | None = None,
    flow: Flow | None = None,
) -> Iterator[tuple[int, SearchResult | SdtError]]:
    """Search many problems with one method, merging their model requests; yields each as it ends.

    Yields (problem index, SearchResult), or (problem index, error) for a problem whose reward or context failed.
    Results do not depend on which problems run together. `resume` goes on with one problem's saved search. ConfigurationError comes before any model call.
    With `sharing`, several searches work on each problem or start from earlier evidence; one result a problem comes out.
    `flow`: what s_adt, smc and snis propose with; results stay exact whatever it is, s_adt's leaf_values apart.
    """
    checked = validate_options(method, options)
    get_method(method).check_flow(flow is not None)
    if sharing is not None and flow is not None:
        raise ConfigurationError(
            "sharing: given together with a flow, allowed: one of them; leave one out."
        )
    if flow is not None:
        process.load_flow(flow)
    if sharing is not None:
        return _run_teams(
            process, problems, sharing, method, checked, seed, in_flight, on_progress, resume
        )
    name = None if flow is None else flow.identity
    searches = (
        open_search(
            process, problem, method=method, options=checked, seed=seed, resume=resume, flow=name
        )
        for problem in problems
    )
    return drive(process, searches, in_flight=in_flight, on_progress=on_progress)


def _run_teams(
    process: Process,
    problems: Sequence[SearchProblem],
    sharing: SharingPlan,
    method: str,
    options: SearchOptions,
    seed: int,
    in_flight: int,
    on_progress: Progress | None,
    resume: Snapshot | None,
) -> Iterator[tuple[int, SearchResult | SdtError]]:
    """`run_searches` with the members of each problem as searches of their own, beside each other."""
    check_sharing(method, options, sharing.searchers_per_problem, sharing.warm is not None)
    if resume is not None:
        raise ConfigurationError(
            "resume: given together with shared evidence, allowed: one of them; leave one out."
        )
    sessions: dict[int, list[Session]] = {}

    def searches() -> Iterator[tuple[Session, Search]]:
        for problem in problems:
            team = sessions[problem.index] = []
            for membership in sharing.members(problem.index):
                session, search = open_search(
                    process,
                    problem,
                    method=method,
                    options=options,
                    seed=seed,
                    membership=membership,
                )
                team.append(session)
                yield session, search

    size = sharing.searchers_per_problem
    runs = drive(process, searches(), in_flight=in_flight * size, on_progress=on_progress)
    return _one_a_problem(runs, sessions, size)


def _one_a_problem(
    runs: Iterator[tuple[int, SearchResult | SdtError]],
    sessions: dict[int, list[Session]],
    size: int,
) -> Iterator[tuple[int, SearchResult | SdtError]]:
    """Members' outcomes, merged when all of a problem have ended; the first error is the problem's."""
    outcomes: dict[int, list[SearchResult | SdtError]] = {}
    for index, outcome in runs:
        ended = outcomes.setdefault(index, [])
        ended.append(outcome)
        if len(ended) < size:
            continue
        team = sessions.pop(index)
        errors = [e for e in outcomes.pop(index) if isinstance(e, SdtError)]
        results = [r for r in ended if isinstance(r, SearchResult)]
        calls = len(frozenset[int]().union(*(session.budget.calls for session in team)))
        yield index, errors[0] if errors else merge_members(results, model_calls=calls)


def open_search(
    states: States,
    problem: SearchProblem,
    *,
    method: str,
    options: SearchOptions,
    seed: int,
    cache_name: str = "",
    resume: Snapshot | None = None,
    membership: Membership | None = None,
    flow: str | None = None,
) -> tuple[Session, Search]:
    """A search that is ready to be driven: its session and its generator.

    states: of the process that will answer it. options: from `validate_options`. cache_name: tells apart searches of one
    problem that run beside each other on one backend: caches are per search, so that no companion changes what a search
    costs. membership: its place in a team
    (`search.sharing_plan`), whose searches on one backend share their caches. flow: the identity of a flow that the process
    holds. ConfigurationError where the method has no use for one, or lacks it.
    """
    chosen = get_method(method)
    chosen.check_flow(flow is not None)
    name = f"{problem.index}/{cache_name}".encode()
    digest = hashlib.blake2b(problem.root.digest + name, digest_size=16).digest()
    own = replace(problem, root=replace(problem.root, digest=digest))
    session = Session(own, states, options, seed, resumed=resume, membership=membership, flow=flow)
    if resume is not None:
        resume.check(session.header(method))
    return session, chosen.run(session)


def search(
    model: Any,
    prompt: str | Sequence[int] | np.ndarray | Context,
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
    flow: Flow | None = None,
    **options: Any,
) -> SearchResult:
    """Samples of p(x|prompt) exp(lambda r(x)) by one method.

    model: from `load_model`, or any object with `LLMInterface`. prompt: a string or token ids for language models, a
    1-D array (the history) for forecasters, whose horizon is max_new_tokens; or parts (`sdt_dist.parts`). reward: a Reward, or a callable
    that takes a list of finished samples (token lists, generated part only; arrays [B, horizon] for forecasters)
    and returns floats. options: the method's (num_rollouts, inverse_temperature, num_samples, wave_size, ...).
    resume: a tree method's saved search of the same prompt and reward, to go on with up to a larger budget.
    flow: what s_adt, smc and snis use, to propose above all; any other method refuses one.
    Raises ConfigurationError, ContextError or RewardError; nothing is computed before options are checked.
    """
    from sdt_dist.models.interface import interface_process
    from sdt_dist.rewards.base import as_reward

    validate_options(method, options)
    get_method(method).check_flow(flow is not None)
    law = {"sampling_temperature": sampling_temperature, "top_k": top_k, "top_p": top_p}
    process = (
        model.process(max_new_tokens, **law)
        if hasattr(model, "process")
        else interface_process(model, max_new_tokens, **law)
    )
    context = as_context(prompt, process.takes)
    problem = SearchProblem(0, process.root(context), as_reward(reward, process.sample_view))
    ((_, outcome),) = run_searches(
        process,
        [problem],
        method=method,
        options=options,
        seed=seed,
        on_progress=on_progress,
        resume=Snapshot.load(resume) if isinstance(resume, (str, Path)) else resume,
        flow=flow,
    )
    if isinstance(outcome, SdtError):
        raise outcome
    return outcome
