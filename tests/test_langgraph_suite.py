"""make test-langgraph: what it makes of two runs of a library's tests. The runs themselves are by hand and in CI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.langgraph_suite import libraries
from tests.langgraph_suite import run as suite
from tests.langgraph_suite.libraries import AGENTS, LANGGRAPH, TOOL_NODE, CannotRun, Library
from tests.langgraph_suite.outcomes import Outcomes, compare, suspects, table


def noted(**ended: str) -> Outcomes:
    lines = [{"collected": len(ended)}]
    lines += [{"test": test, "outcome": outcome, "why": f"why {test}\nmore"} for test, outcome in ended.items()]  # type: ignore[misc]
    return Outcomes.read(json.dumps(line) + "\n" for line in lines)


def test_a_test_that_failed_in_one_phase_has_failed() -> None:
    lines = [{"test": "a", "outcome": outcome, "why": outcome} for outcome in ("failed", "passed")]
    lines += [{"test": "b", "outcome": outcome, "why": outcome} for outcome in ("passed", "failed")]
    outcomes = Outcomes.read([*(json.dumps(line) + "\n" for line in lines), '{"test": "half a li'])
    assert outcomes.ended == {"a": "failed", "b": "failed"} and outcomes.why["b"] == "failed"


def test_only_what_passed_bare_and_not_wrapped_is_suspected() -> None:
    bare = noted(same="passed", worse="passed", gone="passed", better="failed", skipped="skipped")
    wrapped = noted(same="passed", worse="failed", better="passed", skipped="failed")
    assert suspects(bare, wrapped) == ["worse", "gone"]


def test_each_suspect_is_meant_unlucky_or_differs() -> None:
    bare = noted(meant="passed", unlucky="passed", sometimes="passed", always="passed", lost="passed")
    wrapped = noted(meant="failed", unlucky="failed", sometimes="failed", always="failed")
    again = [
        noted(unlucky="passed", sometimes="passed", always="failed"),
        noted(unlucky="passed", sometimes="failed", always="failed"),
    ]
    compared = compare(bare, wrapped, again, {"^mea": "it is meant"})
    assert compared.meant == {"meant": "it is meant"} and compared.unlucky == ["unlucky"]
    assert list(compared.differing) == ["sometimes", "always", "lost"]
    text = table(bare, wrapped, compared)
    assert "passed           5        0" in text and "1 differ by design: it is meant\n  meant" in text
    assert "1 DIFFER: why always\n  always" in text and "did not run to its end" in text


def test_nothing_differs() -> None:
    compared = compare(noted(a="passed"), noted(a="passed"), [], {})
    assert table(noted(a="passed"), noted(a="passed"), compared).endswith("Nothing differs.")


def test_a_checkout_gives_its_tests_and_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(libraries, "BUILD", tmp_path / "build")
    monkeypatch.setattr(Library, "version", "1.2")
    library = tmp_path / "checkout" / "libs" / "langgraph"
    for name in ("tests/conftest.py", "langgraph/pregel/__init__.py"):
        (library / name).parent.mkdir(parents=True)
        (library / name).touch()
    (library / "pyproject.toml").write_text('[project]\nname = "langgraph"\nversion = "1.0"\n')
    for source in (tmp_path / "checkout", library):
        home = suite.tests_of(LANGGRAPH, source)
        assert sorted(found.name for found in home.iterdir()) == ["pyproject.toml", "tests"]
    assert "the checkout is 1.0, installed is 1.2" in capsys.readouterr().err
    with pytest.raises(CannotRun, match="is no checkout of LangGraph"):
        suite.tests_of(LANGGRAPH, tmp_path)


def test_tests_that_cannot_be_had_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(libraries, "BUILD", tmp_path)
    assert suite.main(["--source", str(tmp_path / "nowhere")]) == 2
    assert "is no checkout of LangGraph" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        suite.main(["--help"])
    assert "memory_migrate_sends" in capsys.readouterr().out


def test_what_the_tests_pin_is_not_constrained_to_another_version() -> None:
    versions = "httpx==0.28\nuvloop==0.23.0\nPsycopg_Binary==3.2\norla @ file:///here\n"
    needed = ["httpx", "uvloop==0.22.1", "psycopg-binary[c]==3.1; python_version > '3'"]
    assert libraries.without_pinned(versions, needed) == "httpx==0.28\norla @ file:///here\n"


def test_what_became_of_early_tools_is_summed_over_processes() -> None:
    bare = noted(a="passed")
    lines = [{"early": {"started": 2, "taken in their place": 1}}, {"early": {"started": 1_000}}]
    wrapped = Outcomes.read(
        json.dumps(line) + "\n" for line in [{"test": "a", "outcome": "passed", "why": ""}, *lines]
    )
    text = table(bare, wrapped, compare(bare, wrapped, [], {}))
    assert "tools that were started early: 1,002 started, 1 taken in their place" in text


@pytest.mark.parametrize("library", [AGENTS, LANGGRAPH, TOOL_NODE], ids=lambda library: library.package)
def test_each_library_is_installed_and_its_causes_are_patterns(library: Library) -> None:
    assert library.version and library.build.name == f"{library.package}-suite"
    for pattern, cause in (*library.by_design.items(), *library.by_design_early.items()):
        assert re.compile(pattern) and cause


def test_a_run_in_which_no_tool_started_early_shows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(libraries, "BUILD", tmp_path)
    monkeypatch.setattr(suite, "tests_of", lambda *_: tmp_path)
    monkeypatch.setattr(suite, "environment_for", lambda *_: tmp_path)
    monkeypatch.setattr(suite.Suite, "run", lambda *_, **__: noted(a="passed"))
    assert suite.main(["--tools", "--agents"]) == 1 and suite.main(["--agents"]) == 0
    assert "this shows nothing" in capsys.readouterr().out
