"""The evaluation run: the same problems, prior, reward and matched budget for every method; resumable.

See docs/guides/evaluate.md. It must not know who makes the searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdt_dist.evaluation.directory import RunDirectory
from sdt_dist.evaluation.environment import note_environment, server_record
from sdt_dist.evaluation.executor import Assignment, Executor, InProcess, Outcome
from sdt_dist.evaluation.plan import Plan
from sdt_dist.evaluation.results import Line, ResultLog, result_line, save_tree
from sdt_dist.evaluation.run_evidence import RunEvidence
from sdt_dist.evaluation.summary import Summary, recompute
from sdt_dist.search.result import SearchResult


class Progress:
    """Told of every finished problem; the command line draws a bar from it."""

    def start(self, total: int) -> None:
        """`total` problem-method pairs will be searched."""

    def done(self, line: Line) -> None:
        """One pair is on disk."""


def run_evaluation(
    plan: Plan,
    output: RunDirectory,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    servers: Sequence[dict[str, Any]] | None = None,
) -> Summary:
    """Search every problem with every method, then summarise. Killed at any instant, it goes on from what is on disk.

    executor: makes the searches; default: this process does. servers: records of who answers for the model,
    for environment.json; default: this process. ResultsError when the disk refuses.
    A problem whose reward or context fails is recorded as failed and the others go on.
    """
    answering = servers or [server_record(plan.config.model)]
    search_all(plan, output, executor=executor, progress=progress, servers=answering)
    return recompute(output.path)


def search_all(
    plan: Plan,
    output: RunDirectory,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    servers: Sequence[dict[str, Any]] = (),
) -> None:
    """`run_evaluation` without its summary, so that whoever only searches need not load the metrics.

    Without `servers` there is no environment.json.
    """
    progress = progress or Progress()
    executor = executor or InProcess()
    # 1. What is on disk, and what is still to be searched.
    log = output.open()
    evidence = RunEvidence(plan, output.path)
    assignments = _assignments(plan, log, evidence)
    progress.start(len(assignments))
    if not assignments:
        return
    if servers:
        note_environment(output.path, servers)
    # 2. Every outcome: what is kept of the search, then the line that says that it is done.
    for assignment, outcome in executor.run(plan, assignments):
        _keep(assignment, outcome, output, evidence)
        method = assignment.method
        config = plan.config
        line = result_line(
            config.task, assignment.problem, method.name, method.label, config.seed, outcome
        )
        log.append(line)
        progress.done(line)


def _assignments(plan: Plan, log: ResultLog, evidence: RunEvidence) -> list[Assignment]:
    """What the log has no line of, method after method; a method's first search is kept."""
    done = log.done()
    assignments = []
    for method in plan.methods:
        for problem in plan.problems:
            if (problem.index, method.label) in done:
                continue
            keeps_search = problem.index == 0 or evidence.is_kept(method)
            assignments.append(Assignment(problem, method, evidence.sharing(method), keeps_search))
    return assignments


def _keep(
    assignment: Assignment, outcome: Outcome, output: RunDirectory, evidence: RunEvidence
) -> None:
    """Put what is kept of a search beside the results: one tree a method, and walks where they are asked for."""
    if not isinstance(outcome, SearchResult) or outcome.snapshot is None:
        return
    if assignment.problem.index == 0:
        save_tree(output.path, assignment.method.label, outcome.snapshot)
    if evidence.is_kept(assignment.method):
        evidence.keep(assignment.method, assignment.problem.index, outcome.snapshot)
