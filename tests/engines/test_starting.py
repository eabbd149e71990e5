"""An engine that dies or hangs while it starts, or later, is told with what it said."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from orla_lg.engines import starting
from orla_lg.engines.progress import Progress
from orla_lg.engines.recipe import EngineOptions, Place, Served
from orla_lg.engines.running import Running, all_running, log_of
from orla_lg.errors import EngineError
from orla_lg_llamacpp.embedded import free_port

# Answers every GET; ends with status 7 when it gets a POST.
ENGINE = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        print("ValueError: asked to die", flush=True)
        os._exit(7)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Script:
    """An engine that is a Python script."""

    adapter = "openai"
    ready_timeout_s = 30.0

    def __init__(self, code: str) -> None:
        self.code = code

    def prepare(self, options: EngineOptions, progress: Progress) -> EngineOptions:
        return options

    @contextlib.contextmanager
    def serve(self, options: EngineOptions, place: Place) -> Iterator[Served]:
        with place.log.open("ab") as log:
            words = [sys.executable, "-c", self.code, str(place.port)]
            child = subprocess.Popen(words, stdout=log, stderr=log, pass_fds=(place.lock,))
        try:
            yield Served(child.pid, group=0, poll=child.poll)
        finally:
            child.kill()
            child.wait()

    def phase(self, said: str) -> str:
        return "starting"

    def load(self, root: str) -> str:
        return "idle"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORLA_CACHE_DIR", str(tmp_path))
    return tmp_path


def serve(monkeypatch: pytest.MonkeyPatch, recipe: Script, then: str = "") -> Running:
    """Serve in this process, do something once the engine is ready, and return it."""
    monkeypatch.setitem(starting.RECIPES, "script", recipe)
    ready: list[Running] = []

    def told(engine: Running) -> None:
        ready.append(engine)
        assert all_running() == [engine]
        if then == "interrupt":
            raise KeyboardInterrupt
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(engine.root, trust_env=False)

    starting.serve(EngineOptions("script", name="tiny", port=free_port()), told)
    return ready[0]


def test_one_that_ends_by_itself_is_told_with_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"ended by itself, with status 7; its last lines(.|\n)*asked to die"):
        serve(monkeypatch, Script(ENGINE))
    assert all_running() == []


def test_one_that_is_asked_to_end_leaves_no_file(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    code = ENGINE.replace("os._exit(7)", "os._exit(0)")
    engine = serve(monkeypatch, Script(code))
    assert (engine.name, engine.engine) == ("tiny", "script")
    assert list((home / "run").iterdir()) == []


def test_an_interrupt_ends_it(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        serve(monkeypatch, Script(ENGINE), "interrupt")
    assert list((home / "run").iterdir()) == []


def test_one_that_dies_at_the_start_is_told_by_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "[print('noise', n) for n in range(99)]; raise RuntimeError('no model')"
    with pytest.raises(EngineError, match=r"did not start; its last lines(.|\n)*RuntimeError: no model"):
        serve(monkeypatch, Script(code))


def test_one_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Script("import time; print('still here', flush=True); time.sleep(600)")
    recipe.ready_timeout_s = 0.5
    with pytest.raises(EngineError, match=r"was not ready within 0.5 s; (.|\n)*still here"):
        serve(monkeypatch, recipe)


def test_an_old_log_is_not_taken_for_the_new_ones(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    port = free_port()
    log_of(port).write_text("KeyError: of the time before last\n")
    monkeypatch.setitem(starting.RECIPES, "script", Script("raise SystemExit('ValueError: new')"))
    with pytest.raises(EngineError, match="ValueError: new") as caught:
        starting.serve(EngineOptions("script", port=port), lambda engine: None)
    assert "time before last" not in str(caught.value)


def test_errors_come_first_and_without_errors_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    said = ["WARNING OSError: never mind", "(Core) ERROR [a.py] ValueError: why", *["noise"] * 50, "ValueError: why"]
    log.write_text("\n".join([*said, "the end"]))
    assert starting.told(log).splitlines()[1:] == ["  ValueError: why", "  the end"]
    log.write_text("\n".join(str(number) for number in range(50)))
    assert starting.told(log).split()[-10:] == [str(number) for number in range(40, 50)]


def test_a_port_taken_by_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(starting.RECIPES, "script", Script(ENGINE))
    port, ready, end = free_port(), threading.Event(), threading.Event()

    def until_end(engine: Running) -> None:
        ready.set()
        end.wait(30)
        raise KeyboardInterrupt

    def first() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            starting.serve(EngineOptions("script", port=port), until_end)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert ready.wait(30)
        with pytest.raises(EngineError, match=f"an engine already runs on port {port}"):
            starting.start(EngineOptions("script", port=port), Progress())
    finally:
        end.set()
        thread.join()
