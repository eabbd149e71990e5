"""How a benchmark begins and ends on its command line, and shows how far it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.lib import command as marks
from bench.lib.command import bar, ended, finish, parser, tell, usual
from orla_lg.errors import EngineError


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def test_an_end_without_figures_is_a_line() -> None:
    assert ended(lambda: 3, "all is kept") == 3
    assert ended(raising(KeyboardInterrupt()), "all is kept") == "\nstopped; all is kept"
    failed = ended(raising(ExceptionGroup("runs", [EngineError("the engine is gone")])), "all is kept")
    assert failed == "\na call failed: the engine is gone"
    with pytest.raises(ValueError, match="of ours"):
        ended(raising(ValueError("a mistake of ours")), "all is kept")


def test_help_is_the_docstring_as_it_stands() -> None:
    said = parser("some", "What it does.\n\n    make bench-some     a table").format_help()
    assert "usage: python -m bench.some" in said and "\n    make bench-some     a table\n" in said


def test_an_experiment_takes_the_usual_options_that_it_has() -> None:
    options = parser("some", "What it does.")
    usual(options, rounds=3, keep="some.json", writes="docs/some.md")
    args = options.parse_args(["--rounds", "2", "--write"])
    assert (args.rounds, args.keep, args.write) == (2, Path("some.json"), True)
    usual(none := parser("none", ""), keep="")
    assert vars(none.parse_args([])) == {"keep": None}


def test_what_was_found_is_printed_and_goes_into_a_page_if_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{marks.begin('some')}\n{marks.END}\n")
    assert finish(["one"], "some", None) == finish(["two"], "some", page, ["![drawn](some.svg)"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert page.read_text().split("\n")[1:5] == ["", "two", "![drawn](some.svg)", ""]


def test_elsewhere_than_on_a_terminal_each_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    tell("round 1/2")
    tick = bar("bare", 2)
    tick()
    tell("measured", last=True)
    first, begun, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("round 1/2", "measured") and begun.startswith("bare ") and "·" * 20 in begun
