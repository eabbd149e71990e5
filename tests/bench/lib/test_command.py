"""How a benchmark begins and ends on its command line, and shows how far it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.lib.command import ended, parser
from bench.lib.progress import bar, tell
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


def test_elsewhere_than_on_a_terminal_each_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    tell("round 1/2")
    tick = bar("bare", 2)
    tick()
    tell("measured", last=True)
    first, begun, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("round 1/2", "measured") and begun.startswith("bare ") and "·" * 20 in begun
