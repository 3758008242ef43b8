"""What a kind of problem is: where its problems come from, how results are measured, and how they are shown.

See docs/guides/evaluate.md. An evaluation asks its task and knows no kind of problem by itself. A problem's context is all
that a model continues and all that a reward may see (`RewardContext.of`); the truth is the task's alone. This module must not
know searches, methods or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from sdt_dist.parts import Context
from sdt_dist.protocols import Sample

Row = dict[str, float]  # measures by name


class Column(NamedTuple):
    """A metric's name in summary.json, its headings in Markdown and in a terminal, and which values are good."""

    metric: str
    title: str
    short: str
    better: str


class Problem(Protocol):
    """One problem: its number and name in a run, and what is continued."""

    @property
    def index(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> Context: ...


ProblemT = TypeVar("ProblemT", bound=Problem)


class Task(Protocol[ProblemT]):
    """A kind of problem. Those of `tasks.registry` are values without state.

    columns: the measures of quality that tables show, in their order; what every search has (reward, ESS, cost) comes after
    them. ratios: measures that are a ratio of two sums over problems, by the names of the summands in a row. intervals: the
    measures whose intervals summary.md shows; compared: those that it compares with plain sampling, and comparison says how
    to read that; tested: those of paired tests. truth_name: what the truth is called in tables. figures: names of the figures
    that show samples of this kind, in order.
    """

    name: str
    columns: tuple[Column, ...]
    ratios: Mapping[str, tuple[str, str]]
    intervals: tuple[str, ...]
    compared: tuple[str, ...]
    comparison: str
    tested: tuple[str, ...]
    truth_name: str
    figures: tuple[str, ...]

    def problems(self, dataset: str, **choice: Any) -> list[ProblemT]:
        """The problems of a dataset; SdtError names what is wrong with it, or with the choice."""
        ...

    def record(self, problem: ProblemT) -> dict[str, Any]:
        """A problem as JSON values; `problem_of` reads them."""
        ...

    def problem_of(self, record: Mapping[str, Any]) -> ProblemT:
        """The problem of a record; ValueError, TypeError or KeyError for a damaged one."""
        ...

    def sample_record(self, sample: Sample) -> Any:
        """What a result line keeps of a sample besides its tokens, as JSON values."""
        ...

    def measures(self, samples: Sequence[Any], problem: ProblemT) -> Row:
        """Measures of the samples of a search, as `sample_record` gave them, against the truth."""
        ...

    def truth(self, problem: ProblemT) -> Row:
        """Measures of the truth itself, where a method should come near; none where it has no such measure."""
        ...

    def length_of(self, problem: ProblemT) -> int:
        """Tokens of the true answer."""
        ...
