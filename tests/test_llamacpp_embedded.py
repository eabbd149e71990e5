"""The embedded engine answers, lives beside another, and closes whatever is still open."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg.errors import EngineError
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings

SMALL = {"slots": 2, "context_tokens": 1024}
CLOSE_LIMIT_S = 20.0
BUSY_LIMIT_S = 30.0


@pytest.fixture(scope="module")
def engine() -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(EngineSettings(**SMALL, name="tiny")) as engine:
        yield engine


def chat(engine: EmbeddedEngine, **fields: Any) -> httpx.Response:
    body = {"model": engine.name, "messages": [{"role": "user", "content": "Say hello."}], **fields}
    return httpx.post(f"{engine.url}/chat/completions", json=body, timeout=120, trust_env=False)


def root(engine: EmbeddedEngine) -> str:
    return engine.url.removesuffix("/v1")


def until_busy(engine: EmbeddedEngine) -> None:
    deadline = time.monotonic() + BUSY_LIMIT_S
    while time.monotonic() < deadline:
        slots = httpx.get(f"{root(engine)}/slots", timeout=BUSY_LIMIT_S, trust_env=False).json()
        if any(slot["is_processing"] for slot in slots):
            return
    pytest.fail("no slot became busy")


@pytest.mark.engine
def test_it_answers_under_its_name(engine: EmbeddedEngine) -> None:
    answer = chat(engine, max_tokens=4).raise_for_status().json()
    assert answer["model"] == "tiny"
    assert answer["usage"]["completion_tokens"] > 0
    models = httpx.get(f"{engine.url}/models", trust_env=False).json()
    assert [model["id"] for model in models["data"]] == ["tiny"]


@pytest.mark.engine
def test_it_has_the_slots_and_context_asked_for_and_they_can_be_erased(engine: EmbeddedEngine) -> None:
    props = httpx.get(f"{root(engine)}/props", trust_env=False).json()
    assert props["total_slots"] == 2
    assert props["default_generation_settings"]["n_ctx"] == 1024
    chat(engine, max_tokens=1, id_slot=0).raise_for_status()
    again = chat(engine, max_tokens=1, id_slot=0).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    httpx.post(f"{root(engine)}/slots/0?action=erase", trust_env=False).raise_for_status()
    after = chat(engine, max_tokens=1, id_slot=0).json()
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.engine
def test_a_slot_is_saved_where_it_was_asked_for(tmp_path: Path) -> None:
    with EmbeddedEngine(EngineSettings(**SMALL, save_dir=tmp_path / "slots")) as engine:
        chat(engine, max_tokens=1, id_slot=0).raise_for_status()
        saved = httpx.post(
            f"{root(engine)}/slots/0?action=save", json={"filename": "one"}, trust_env=False, timeout=30
        )
        saved.raise_for_status()
    assert (tmp_path / "slots" / "one").is_file()


@pytest.mark.engine
def test_two_side_by_side_and_closing_one_leaves_the_other(engine: EmbeddedEngine) -> None:
    other = EmbeddedEngine(EngineSettings(**SMALL, name="other"))
    try:
        assert other.url != engine.url
        assert chat(other, max_tokens=1).json()["model"] == "other"
    finally:
        other.close()
    other.close()
    assert other.closed
    assert chat(engine, max_tokens=1).json()["model"] == "tiny"
    with pytest.raises(httpx.ConnectError):
        chat(other)


# In a process of its own: a close that hangs holds the interpreter's lock, so no timeout in here would fire.
CLOSE_WHILE_OPEN = """
import httpx, sys, threading
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from test_llamacpp_embedded import chat, until_busy

engine = EmbeddedEngine(EngineSettings(slots=2, context_tokens=4096, threads=1))
failed = threading.Event()
def call():
    try:
        chat(engine, stream=sys.argv[1] == "stream", max_tokens=4000, ignore_eos=True)
    except httpx.HTTPError:
        failed.set()
threading.Thread(target=call, daemon=True).start()
until_busy(engine)
if sys.argv[2] == "close":
    engine.close()
    assert failed.wait(10), "the client was not told"
print("closed", flush=True)
"""


@pytest.mark.engine
@pytest.mark.parametrize("how", ["stream", "plain"])
@pytest.mark.parametrize("end", ["close", "exit"])
def test_closing_with_a_request_open_does_not_hang(how: str, end: str) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", CLOSE_WHILE_OPEN, how, end],
        timeout=BUSY_LIMIT_S + CLOSE_LIMIT_S,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


@pytest.mark.engine
def test_it_says_nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with EmbeddedEngine(EngineSettings(**SMALL)) as engine:
        chat(engine, max_tokens=1).raise_for_status()
        assert chat(engine, messages="hello").is_error
        assert chat(engine, messages=[{"role": "user", "content": "a b c " * 2000}]).is_error
    assert capfd.readouterr() == ("", "")


@pytest.mark.engine
def test_signals_still_reach_python(engine: EmbeddedEngine) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        chat(engine, max_tokens=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    engine_threads = [path for path in Path("/proc/self/task").glob("*/status") if masks_usr1(path)]
    assert engine_threads or not Path("/proc/self/task").exists()


def masks_usr1(status: Path) -> bool:
    line = next(line for line in status.read_text().splitlines() if line.startswith("SigBlk:"))
    return bool(int(line.split()[1], 16) & 1 << (signal.SIGUSR1 - 1))


@pytest.mark.engine
def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} on 127.0.0.1 cannot be had: Address already in use"):
            EmbeddedEngine(EngineSettings(port=port))


@pytest.mark.engine
def test_a_broken_model_is_named_and_llamacpp_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(EngineError, match=r"could not start with .*broken\.gguf"):
        EmbeddedEngine(EngineSettings(model_path=broken))
    said, until_s = capfd.readouterr().err, time.monotonic() + 20
    while "broken.gguf" not in said and time.monotonic() < until_s:  # a thread of llama.cpp's writes it
        time.sleep(0.02)
        said += capfd.readouterr().err
    assert "broken.gguf" in said


@pytest.fixture
def no_xllamacpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)


@pytest.mark.usefixtures("no_xllamacpp")
def test_without_xllamacpp_the_extra_is_named() -> None:
    with pytest.raises(EngineError, match=r"pip install 'orla-lg\[demo\]'"):
        EmbeddedEngine()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"PK\3\4", r"is not a GGUF model: it begins with b'PK\\x03\\x04'"), (None, "cannot be read: No such file")],
)
def test_what_is_not_a_model_is_named(
    content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", threading)  # any module: it is not reached
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=said):
        EmbeddedEngine(EngineSettings(model_path=path))


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"threads": -1}, {"port": 70_000}])
def test_settings_that_cannot_be_are_named(wrong: dict[str, int]) -> None:
    (field,) = wrong
    with pytest.raises(EngineError, match=f"EngineSettings.{field} is {wrong[field]}; it must be"):
        EngineSettings(**wrong)
