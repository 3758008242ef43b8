"""What a result and a sample show of themselves: a few lines that say what the fields hold."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from sdt_dist.protocols import Sample
from sdt_dist.search.methods import get_method, method_names
from sdt_dist.search.result import SearchResult
from sdt_dist.values.records import TeamReport
from tests.search_helpers import run_toy


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return run_toy("U", "residual_ts", 0, num_rollouts=40, num_samples=300)


class _Table(HTMLParser):
    """The rows of a table, and every tag that was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    @property
    def rows(self) -> dict[str, str]:
        return dict(
            zip(self.cells[1::2], self.cells[2::2], strict=True)
        )  # the first one is the caption

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def _rows(shown: str) -> dict[str, str]:
    return {line[2:9].strip(): line[9:].strip() for line in shown.splitlines()[1:]}


def test_a_result_of_many_samples_is_ten_lines(result):
    shown = repr(result)
    assert len(shown.splitlines()) <= 10 and len(shown) < 1000
    assert shown.startswith("SearchResult of residual_ts (seed 0)\n")


def test_the_lines_say_what_the_fields_hold(result):
    rows = _rows(repr(result))
    rewards = [sample.reward for sample in result.samples]
    low, high, mean = min(rewards), max(rewards), np.mean(rewards)
    finished = len(result.finished)
    assert rows["samples"] == (
        f"300 ({finished} distinct sequences finished), reward {low:.4g} to {high:.4g}, mean {mean:.4g}"
    )
    assert rows["best"].startswith(
        f"reward {result.best.reward:.4g}, log p {result.best.log_prob:.4g}, "
    )
    assert rows["log Z"] == f"{result.log_z:.4g} ± {result.log_z_error:.2g} (Z unbiased)"
    assert rows["ESS"] == f"{result.ess:.4g}"
    assert re.findall(r"[\d,]+", rows["nfe"]) == [str(result.nfe), str(result.model_calls)]
    assert f"{result.tree_stats['nodes']:.0f} nodes" in rows["tree"]


@pytest.mark.parametrize(
    "method", [name for name in method_names() if get_method(name).flow != "required"]
)
def test_what_a_method_does_not_claim_has_no_line(method):
    found = run_toy(
        "U", method, 0, **({} if get_method(method).reference else {"num_rollouts": 20})
    )
    rows = _rows(repr(found))
    assert ("log Z" in rows, "ESS" in rows) == (found.log_z is not None, found.ess is not None)
    assert ("tree" in rows) == bool(found.tree_stats)
    assert not {"flow", "team"} & set(rows)


def test_a_notebook_gets_the_same_rows_as_a_table(result):
    table = _Table(result._repr_html_())
    assert table.rows == _rows(repr(result))
    assert table.cells[0] == repr(result).splitlines()[0]


def test_a_model_s_text_cannot_write_html(result):
    written = "<script>alert(1)</script>"
    best = replace(result.best, text=written)
    table = _Table(replace(result, best=best)._repr_html_())
    assert set(table.tags) == {"table", "caption", "tbody", "tr", "th", "td"}
    assert written in "".join(table.cells)


def test_a_flow_and_a_team_are_named(result):
    team = TeamReport("run/0/0", (2, 3), {"run/0/0": (5, 20)})
    rows = _rows(
        repr(replace(result, flow="f0123", team=team, exhausted=True, deterministic=False))
    )
    assert rows["flow"] == "f0123"
    assert rows["team"] == "1 streams; incomplete, missing searchers 2, 3"
    assert rows["tree"].endswith("exhausted")


def test_a_sample_is_one_line_whatever_its_length():
    series = np.linspace(0.0, 5.0, 48)
    forecast = Sample(tuple(range(48)), -0.25, -160.0, "length", series=series)
    assert repr(forecast) == "<Sample: reward -0.25, log p -160, 48 tokens (length), values 0 to 5>"
    text = Sample((1, 2), 1.0, -3.0, "eos", text="a\n" * 500)
    assert str(text).startswith("reward 1, log p -3, 2 tokens (eos), text 'a\\na\\n")
    assert "\n" not in str(text) and len(str(text)) < 160
    assert str(Sample((), 0.0, 0.0, "eos")) == "reward 0, log p 0, 0 tokens (eos)"
