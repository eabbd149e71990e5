"""No number on a benchmark's command line gets past ``argparse`` that the benchmark cannot work with."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
NAMES = sorted(path.stem for path in BENCH.glob("*.py") if "parse_args" in path.read_text())


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], Any]]:
    """Returns a benchmark's module; what importing it left behind is taken away again."""
    sys.path.insert(0, str(BENCH))
    before = set(sys.modules)
    yield import_module
    sys.path.remove(str(BENCH))
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def parser_of(module: Any, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """Let the benchmark build its parser, and stop it there."""
    made: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *args: object) -> None:
        made.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    begin = getattr(module, "options", None) or module.main
    with pytest.raises(SystemExit):
        asyncio.run(begin()) if inspect.iscoroutinefunction(begin) else begin()
    return made[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_its_bounds(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for flag in parser_of(bench(name), monkeypatch)._actions:
        assert flag.choices or flag.type not in (int, float), f"{name} {flag.option_strings[0]} takes any number"


@pytest.mark.parametrize("said", ["0", "-3", "1.5", "many", "inf"])
def test_pressure_refuses_what_is_no_number_of_sessions(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pressure.py", f"--sessions={said}"])
    with pytest.raises(SystemExit) as ended:
        bench("pressure").main()
    assert ended.value.code == 2
    assert f"argument --sessions: expected a whole number, 1 or more, got '{said}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("count", ["1", "7"], ["0", "-1"]),
        ("whole", ["0"], ["-1", "0.5"]),
        ("folds", ["2"], ["1"]),
        ("port", ["0", "65535"], ["-1", "65536"]),
        ("amount", ["0", "2.5"], ["-0.1", "nan", "inf"]),
        ("above_zero", ["0.1"], ["0", "-1", "inf"]),
        ("share", ["0", "0.5", "1"], ["-0.1", "1.1", "nan"]),
    ],
)
def test_what_each_kind_of_number_may_be(
    bench: Callable[[str], Any], kind: str, right: list[str], wrong: list[str]
) -> None:
    read = getattr(bench("flags"), kind)
    assert [read(said) for said in right] == [float(said) for said in right]
    for said in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected a .*, got"):
            read(said)
