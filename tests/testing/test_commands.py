"""``orla-lg conform``: what it prints and its exit status."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import pytest

from orla_lg.testing import commands
from orla_lg.testing.conformance import CHECKS
from orla_lg.testing.faults import Fault, FaultEngine, Reply


@pytest.fixture
def engine() -> Iterator[FaultEngine]:
    with FaultEngine(otherwise=Reply(token_s=0.002), key="the-key") as running:
        yield running


def conform(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="orla-lg")
    commands.register(parser.add_subparsers())
    args = parser.parse_args(["conform", *argv])
    return int(args.run(args))


def test_it_prints_each_check_as_it_ends(
    engine: FaultEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_KEY", "the-key")
    assert conform("--url", engine.url, "--api-key-env", "ENGINE_KEY") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[: len(CHECKS)]] == [check.name for check in CHECKS]
    assert lines[-1].startswith(f"OpenAIAdapter on {engine.url}: ") and " 0 failed, " in lines[-1]


def test_json_is_only_json(engine: FaultEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.key = None
    engine.chances = {Fault.NO_USAGE: 1.0}
    only = ("--only", "probe_answers", "--only", "usage_comes_at_the_end")
    assert conform("--url", engine.url, "--json", *only) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert [result["status"] for result in report["results"]] == ["passed", "failed"]
    assert report["results"][1]["message"] == "the stream brought no usage"
    assert "usage_comes_at_the_end" in printed.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "where is the engine? Give --url"),
        (("--url", "127.0.0.1:8000"), "is not http(s)://"),
        (("--url", "http://127.0.0.1:1/v1", "--engine", "vlm"), "unknown engine 'vlm'; did you mean 'vllm'?"),
        (("--url", "http://127.0.0.1:1/v1", "--only", "usage"), "no check is called 'usage'"),
        (("--url", "http://127.0.0.1:1/v1", "--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set"),
    ],
)
def test_a_wrong_command_is_told(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert conform(*argv) == 2
    assert said in capsys.readouterr().err


def test_an_engine_that_is_away_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert conform("--url", "http://127.0.0.1:1/v1", "--only", "probe_answers") == 1
    assert "nothing passed: does the engine answer?" in capsys.readouterr().out


def test_the_list_says_what_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert conform("--list") == 0
    printed = capsys.readouterr().out
    assert all(check.name in printed and check.asserts in printed for check in CHECKS)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        conform("--help")
    assert "exit status: 0 it conforms" in capsys.readouterr().out
