"""``orla-lg engine``: up, status, down, as a user runs them."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg.engines import commands
from orla_lg.engines.running import Running, remove_logs
from orla_lg.errors import EngineError
from orla_lg_llamacpp.model import ensure_model, try_lock

ENGINE = [sys.executable, "-m", "orla_lg.engines.commands", "engine"]
LIMIT_S = 120


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; the model is the one already fetched."""
    monkeypatch.setenv("ORLA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return tmp_path


@pytest.fixture
def model_file(monkeypatch: pytest.MonkeyPatch) -> str:
    path = str(ensure_model())
    monkeypatch.setenv("ORLA_MODEL_FILE", path)
    return path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    args = parser.parse_args(["engine", *words])
    return int(args.run(args))


def engine(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ENGINE, *words], capture_output=True, text=True, timeout=LIMIT_S)


def record(home: Path, port: int, pid: int) -> Path:
    (home / "run").mkdir(exist_ok=True)
    path = home / "run" / f"engine-{port}.json"
    url = f"http://127.0.0.1:{port}/v1"
    path.write_text(json.dumps({"port": port, "pid": pid, "url": url, "name": "tiny", "engine": "llamacpp"}))
    return path


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_the_foreground_until_a_signal(model_file: str, home: Path, number: signal.Signals) -> None:
    words = [*ENGINE, "up", "--threads", "1", "--slots", "1", "--context-tokens", "512", "--name", "my.model"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        lines = [process.stdout.readline()]
        while lines[-1] and "Ctrl-C" not in lines[-1]:
            lines.append(process.stdout.readline())
        said = "".join(lines)
        url = re.findall(r"engine ready at (\S+)", said)[0]
        snippet = tomllib.loads(said.split("orla.toml:")[1].split("try it:")[0])
        assert snippet["backends"]["my.model"] == {"url": url, "model": "my.model", "engine": "llamacpp"}
        assert snippet["mapping"] == {"*": "my.model"}
        assert httpx.get(f"{url}/models", trust_env=False).json()["data"][0]["id"] == "my.model"
        assert run("status") == 0
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (0, "")
    assert list((home / "run").iterdir()) == []


@pytest.mark.engine
def test_detached_then_listed_then_ended(model_file: str, home: Path) -> None:
    up = engine("up", "--detach", "--threads", "1", "--slots", "2", "--context-tokens", "512")
    assert up.returncode == 0, up.stderr
    url = re.findall(r"engine ready at (\S+)", up.stdout)[0]
    pid = int(re.findall(r"process (\d+)", up.stdout)[0])
    port = url.split(":")[2].removesuffix("/v1")
    try:
        again = engine("up", "--detach", "--port", port)
        assert (again.returncode, f"already runs on port {port} (process {pid})" in again.stderr) == (1, True)
        status = engine("status")
        assert (status.returncode, status.stdout) == (
            0,
            f"llamacpp  {url}  smollm2  process {pid}  0 of 2 slots busy\n",
        )
    finally:
        down = engine("down", port)
    assert (down.returncode, down.stdout) == (0, f"ended {url} (process {pid})\n")
    assert engine("status").returncode == 1
    assert list((home / "run").iterdir()) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models", trust_env=False)


def test_a_detached_engine_that_does_not_start_says_why(home: Path) -> None:
    (home / "not.gguf").write_text("hello")
    up = engine("up", "--detach", "--model", str(home / "not.gguf"))
    assert up.returncode == 1
    assert "the engine did not start" in up.stderr
    assert "is not a GGUF model" in up.stderr


def test_the_file_of_an_engine_that_is_gone_is_not_believed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(home, 50_001, os.getpid())  # the number lives, but it is not the engine's any more
    assert run("status") == 1
    assert "no engine runs" in capsys.readouterr().out
    assert not path.exists()
    record(home, 50_001, os.getpid())
    assert run("down", "all") == 0  # and nobody was killed


def test_down_all_removes_the_logs_of_those_that_are_gone(home: Path) -> None:
    with record(home, 50_001, 0).open() as held:
        assert try_lock(held)
        logs = [home / "run" / f"engine-{port}.log" for port in (50_001, 50_002)]
        for log in logs:
            log.touch()
        remove_logs()
    assert [log.exists() for log in logs] == [True, False]
    logs[1].touch()
    assert run("down", "all") == 0  # nothing runs by now
    assert list((home / "run").glob("*.json")) == []
    assert not logs[1].exists()


def test_of_several_one_must_be_named(home: Path) -> None:
    with record(home, 50_001, 1).open() as one, record(home, 50_002, 1).open() as two:
        assert try_lock(one) and try_lock(two)
        with pytest.raises(EngineError, match="name a port or all: 50001, 50002"):
            run("down")
        with pytest.raises(EngineError, match="none on port 50003 that still runs; running: 50001, 50002"):
            run("down", "50003")


def said_of(engine: Running, running: list[Running], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    monkeypatch.setattr(commands, "all_running", lambda: running)
    commands._print_ready(engine)
    return str(capsys.readouterr().out).split("orla.toml:")[1].split("try it:")[0]


@pytest.mark.parametrize(
    "names", [("smollm2", "smollm2", "smollm2"), ("light", "heavy", "light"), ("a.b", "a.b", "c")]
)
def test_what_several_engines_print_is_one_file(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = range(50_001, 50_004)
    engines = [
        Running(port, 1, f"http://127.0.0.1:{port}/v1", name, "llamacpp", 0, "", "")
        for port, name in zip(ports, names, strict=True)
    ]
    printed = [said_of(each, engines[: n + 1], monkeypatch, capsys) for n, each in enumerate(engines)]
    whole = tomllib.loads("".join(printed))
    assert [table["url"] for table in whole["backends"].values()] == [each.url for each in engines]
    assert [table["model"] for table in whole["backends"].values()] == list(names)
    assert whole["mapping"] == {"*": names[0]}
    if names[0] != names[1]:
        assert list(whole["backends"])[:2] == ["light", "heavy"]
    else:
        assert list(whole["backends"])[:2] == [names[0], f"{names[0]}-50002"]
        assert f'your_stage = "{names[0]}-50002"' in printed[1]


def test_an_engine_that_does_not_answer_is_listed_as_such(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with record(home, 1, 1).open() as held:
        assert try_lock(held)
        assert run("status") == 0
    assert "process 1  does not answer (ConnectError)" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("up", "--slots", "0"), ("up", "--port", "http"), ("down", "some")])
def test_wrong_words_are_named(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    assert f"it is {words[-1]!r}; it must be" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "status", "down"])
def test_help_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    assert f"  orla-lg engine {command}" in capsys.readouterr().out
