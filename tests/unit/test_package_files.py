"""What surrounds the code agrees with it: citation, licence, continuous integration, security policy, issue forms."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sdt_dist

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
LICENSE = (ROOT / "LICENSE").read_text()


def test_the_citation_has_what_its_format_asks_for() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert all(CITATION[name] for name in ("message", "title", "authors"))


def test_version_and_licence_are_the_package_s() -> None:
    assert CITATION["version"] == PROJECT["version"] == sdt_dist.__version__
    assert PROJECT["license"] in (CITATION["license"], {"file": "LICENSE"})
    assert LICENSE.startswith(f"{CITATION['license']} License\n")


def test_the_authors_are_the_licence_s() -> None:
    (holder,) = re.findall(r"^Copyright \(c\) \d{4} (.+)$", LICENSE, flags=re.MULTILINE)
    assert CITATION["authors"] == [{"name": holder}]
    assert PROJECT.get("authors", [{"name": holder}]) == [{"name": holder}]


def test_the_date_is_the_changelog_s() -> None:
    """A version that the changelog calls unreleased has no date to cite."""
    heading = re.search(
        rf"^## {re.escape(CITATION['version'])} \((.+)\)$",
        _text("CHANGELOG.md"),
        flags=re.MULTILINE,
    )
    assert heading is not None
    date = None if heading[1] == "unreleased" else heading[1]
    found = CITATION.get("date-released")
    assert date == (None if found is None else str(found))


def test_the_workflow_calls_targets_that_the_makefile_has() -> None:
    called = _called(yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text()))
    targets = set(re.findall(r"^([a-z][a-z-]*):", _text("Makefile"), flags=re.MULTILINE))
    assert called == {"check", "test", "docs"}
    assert called <= targets, f"the Makefile lacks {called - targets}"


def _called(workflow: dict) -> set[str]:
    """The make targets of a workflow, those of a matrix written out."""
    found: set[str] = set()
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            for target in re.findall(
                r"\bmake (\$\{\{ matrix\.\w+ \}\}|[\w-]+)", step.get("run", "")
            ):
                name = re.search(r"matrix\.(\w+)", target)
                found.update([target] if name is None else matrix[name[1]])
    return found


def test_the_workflow_uses_the_lowest_python_and_github_s_own_actions() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    actions = {step["uses"].partition("@")[0] for step in steps if "uses" in step}
    assert actions == {"actions/checkout", "actions/setup-python"}
    versions = {
        step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})
    }
    assert PROJECT["requires-python"] == ">=3.11" and versions == {"3.11"}
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_is_one_that_github_shows(name: str) -> None:
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    ids = [part["id"] for part in fields]
    assert form["name"] and form["description"]
    assert fields and len(set(ids)) == len(ids)
    assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in fields)


def test_the_security_policy_names_a_form_and_no_address() -> None:
    policy = _text("SECURITY.md")
    assert "private advisory form" in policy
    assert "@" not in policy and "http" not in policy
    assert all(
        word in policy
        for word in (
            "cloudpickle",
            "Token authentication",
            "127.0.0.1",
            "safetensors",
            "reward file",
        )
    )


def _text(name: str) -> str:
    return (ROOT / name).read_text()
