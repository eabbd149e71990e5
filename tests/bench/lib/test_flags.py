"""No number on a benchmark's command line gets past ``argparse`` that the benchmark cannot work with."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import sys
from importlib import import_module
from typing import Any

import pytest

from bench.lib import flags
from bench.lib.command import ROOT

EXPERIMENTS = sorted(
    f"bench.{path.relative_to(ROOT / 'bench').with_suffix('').as_posix().replace('/', '.')}"
    for path in (ROOT / "bench").glob("*/*.py")
    if path.parent.name != "lib" and "parse_args" in path.read_text()
)


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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_has_its_bounds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for flag in parser_of(import_module(name), monkeypatch)._actions:
        assert flag.choices or flag.type not in (int, float), f"{name} {flag.option_strings[0]} takes any number"


@pytest.mark.parametrize("said", ["0", "-3", "1.5", "many", "inf"])
def test_pressure_refuses_what_is_no_number_of_sessions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pressure", f"--sessions={said}"])
    with pytest.raises(SystemExit) as ended:
        import_module("bench.pressure.__main__").main()
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
def test_what_each_kind_of_number_may_be(kind: str, right: list[str], wrong: list[str]) -> None:
    read = getattr(flags, kind)
    assert [read(said) for said in right] == [float(said) for said in right]
    for said in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected a .*, got"):
            read(said)
