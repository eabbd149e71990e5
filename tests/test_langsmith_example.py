"""The example of a traced run: without a place for its traces it says so at once."""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from langsmith import utils

from tests.langsmith_collector import Collector

EXAMPLE = Path(__file__).parents[1] / "examples" / "langsmith_tracing.py"
VARIABLES = [f"{start}_{end}" for start in ("LANGSMITH", "LANGCHAIN") for end in ("API_KEY", "ENDPOINT", "TRACING")]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Return what the example ends with in an environment; it has no time for retries."""

    def ended(**environment: str) -> str:
        for name in (*VARIABLES, "LANGCHAIN_TRACING_V2", "LANGSMITH_TRACING_V2"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        utils.get_env_var.cache_clear()
        monkeypatch.setattr(sys, "argv", ["langsmith_tracing.py", "--url", "http://127.0.0.1:9/v1"])
        began = time.monotonic()
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        assert time.monotonic() - began < 5.0
        return str(left.value)

    yield ended
    utils.get_env_var.cache_clear()


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_what_is_missing_is_said_before_anything_runs(fault: Callable[..., str]) -> None:
    assert fault() == "langsmith_tracing.py: tracing is off; set LANGSMITH_TRACING=true"
    assert "LANGSMITH_API_KEY is not set, which https://api.smith" in fault(LANGSMITH_TRACING="true")
    nowhere = fault(LANGSMITH_TRACING="true", LANGSMITH_ENDPOINT="http://127.0.0.1:9")
    assert "no collector of traces answers at http://127.0.0.1:9 (ConnectError" in nowhere


def test_a_key_that_is_refused_is_said(fault: Callable[..., str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            said = fault(LANGSMITH_TRACING="true", LANGSMITH_ENDPOINT=url, LANGSMITH_API_KEY="wrong")
        finally:
            server.shutdown()
            thread.join()
    assert f"{url} does not take this LANGSMITH_API_KEY (status 403)" in said


def test_a_collector_of_ones_own_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector() as collector:
        monkeypatch.delenv("LANGCHAIN_TRACING_V2")
        monkeypatch.setenv("LANGSMITH_TRACING", "true")
        monkeypatch.setenv("LANGSMITH_ENDPOINT", collector.url)
        utils.get_env_var.cache_clear()
        example: dict[str, Any] = runpy.run_path(str(EXAMPLE))
        assert example["tracing_fault"]() is None
    utils.get_env_var.cache_clear()
