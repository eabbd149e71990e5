"""Arrivals from a user's file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from orla_lg.cli import main
from orla_lg.errors import ConfigError
from orla_lg_sim.arrivals import read, run
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters

ENGINE = EngineParameters(block_tokens=128, kv_blocks=200, context_tokens=8192, request_s=0.0)


def trace(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def row(at_ms: int, prompt: int, output: int, *ids: int) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": prompt, "output_length": output, "hash_ids": list(ids)}


def test_equal_ids_are_equal_prefixes(tmp_path: Path) -> None:
    rows = [row(5000, 1100, 10, 1, 2, 3), row(65000, 1100, 10, 1, 2, 4), row(125000, 1100, 10, 1, 9, 3)]
    found = read(trace(tmp_path, *rows), ENGINE)
    assert [arrival.at_s for arrival in found.arrivals] == [0.0, 60.0, 120.0]
    outcomes = run(found.arrivals, SimEngine(ENGINE))
    # The third has another second block of the trace, so nothing after it can be found either.
    assert [outcome.cached_tokens for outcome in outcomes] == [0, 1024, 512]
    assert [outcome.completion_tokens for outcome in outcomes] == [10, 10, 10]


def test_what_cannot_run_is_left_out_and_counted(tmp_path: Path) -> None:
    path = trace(tmp_path, row(0, 9000, 10), row(10, 100, 0), row(20, 100, 10))
    found = read(path, ENGINE)
    assert found.too_long == 1 and [arrival.request.output_tokens for arrival in found.arrivals] == [1, 10]
    assert len(read(path, ENGINE, limit=2).arrivals) == 1


@pytest.mark.parametrize(
    "text",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,9\n",
        "timestamp_ms,input_tokens,output_tokens\n0.0,374,44\n4314.579,396,9\n",
    ],
)
def test_times_and_lengths_from_csv(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    first, second = read(path, ENGINE).arrivals
    assert (first.at_s, second.at_s) == (0.0, pytest.approx(4.314579, abs=1e-6))
    assert (second.request.prompt_tokens, second.request.output_tokens) == (396, 9)


@pytest.mark.parametrize("text", ["{", '{"timestamp": 1}', "[]", ""])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=str(path)):
        read(path, ENGINE)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ENGINE.save(tmp_path / "engine.toml")
    path = trace(tmp_path, row(0, 9000, 10), row(0, 1100, 10, 1, 2, 3), row(60_000, 1100, 10, 1, 2, 3))
    command = ["sim", "replay", "--arrivals", str(path), "--parameters", str(tmp_path / "engine.toml")]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "1 requests have more than 8192 tokens" in told and "1024" in told
    assert main([*command, "--url", "http://127.0.0.1:9/v1"]) == 2
    assert main([*command, "--first", "1"]) == 1
