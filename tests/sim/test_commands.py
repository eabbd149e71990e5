"""``orla-lg sim`` from the command line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from orla_lg.cli import main
from orla_lg_sim.parameters import EngineParameters, load
from orla_lg_sim.server import SimServer

ENGINE = EngineParameters(block_tokens=16, kv_blocks=200, context_tokens=1024, step_s=0.005, request_s=0.0)


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    turns = [{"role": role, "content": f"{role} says {n} " * 6} for n in range(3) for role in ("user", "assistant")]
    path = tmp_path / "sessions.jsonl"
    path.write_text("".join(json.dumps({"session_id": str(n), "messages": turns}) + "\n" for n in range(3)))
    return path


@pytest.mark.parametrize("command", [["sim"], ["sim", "up"], ["sim", "calibrate"], ["sim", "replay"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert command == ["sim"] or "examples:" in capsys.readouterr().out


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "orla_lg", "sim", "up", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def test_up_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    ENGINE.save(tmp_path / "engine.toml")
    options = ["--parameters", str(tmp_path / "engine.toml"), "--kv-tokens", "800", "--model", "mine"]
    with serving(*options) as (process, line):
        url = re.findall(r"http://127\.0\.0\.1:\d+/v1", line)[0]
        assert "800 tokens" in line
        listed = httpx.get(f"{url}/models", verify=False, timeout=30).json()["data"][0]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    assert (listed["id"], listed["max_model_len"]) == ("mine", 800)


def test_a_taken_port_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with SimServer(ENGINE) as server:
        assert main(["sim", "up", "--port", str(server.port)]) == 1
    assert f"port {server.port} cannot be had" in capsys.readouterr().err


def test_a_replay_on_both_sides_is_compared(
    sessions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ENGINE.save(tmp_path / "engine.toml")
    plain = ["sim", "replay", "--sessions", str(sessions), "--think", "0.01", "--every", "0.01"]
    with SimServer(ENGINE) as server:
        assert main([*plain, "--parameters", str(tmp_path / "engine.toml"), "--url", server.url]) == 0
    told = capsys.readouterr().out
    assert re.search(r"calls +9 +9", told) and "live" in told and "simulated" in told
    assert re.search(r"cached tokens .*%", told)
    assert main(plain) == 2


def test_calibrate_tells_what_it_cannot_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine.toml"
    assert main(["sim", "calibrate", "--url", "http://127.0.0.1:9/v1", "--out", str(out)]) == 1
    assert "does not list" in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
def test_calibrate_writes_what_up_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine.toml"
    with SimServer(ENGINE, speed=2.0) as server:
        assert main(["sim", "calibrate", "--url", server.url, "--out", str(out), "--quick"]) == 0
    assert "error of the fit" in capsys.readouterr().out
    assert load(out).kv_blocks == 200
