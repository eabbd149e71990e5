"""A reader of the page's stream, and work for it to show."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from orla_lg.serve.store.store import Store
from tests.serve.in_thread import Running, server
from tests.stub_engine import StubEngine

PATIENCE_S = 10.0

CONFIG = """
[backends.main]
url = "{main}"
max_concurrency = 2
[backends.other]
url = "{other}"
[mapping]
"*" = "main"
[serve]
{serve}
"""


@contextlib.contextmanager
def served(
    folder: Path, engine: StubEngine, store: Store | None = None, address: str = "127.0.0.1:0", serve: str = ""
) -> Iterator[Running]:
    """Serve an engine twice, as two backends, until the block ends."""
    file = folder / "orla.toml"
    file.write_text(CONFIG.format(main=engine.url, other=engine.url, serve=serve), encoding="utf-8")
    with server(file, store=store, address=address) as running:
        while not httpx.get(f"{running.url}/readyz").is_success:
            time.sleep(0.01)
        yield running


def ask(url: str, workflow: str = "thread-1", stage: str = "chat", say: str = "hello", **headers: str) -> int:
    """Make one call of the gateway; returns its status."""
    body = {"model": "auto", "messages": [{"role": "user", "content": say}], "max_tokens": 4}
    sent = {"x-orla-workflow-run": workflow, "x-orla-stage": stage, **headers}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=sent, timeout=30.0).status_code


class Reader:
    """One open stream."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.text = ""
        self._lines = response.iter_lines()

    def events(self) -> Iterator[tuple[str, Any]]:
        name = ""
        for line in self._lines:
            self.text += line + "\n"
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))

    def until(self, name: str, holds: Callable[[Any], bool] = lambda data: True) -> Any:
        """Return what the next event of that name says of which something holds."""
        end_s = time.monotonic() + PATIENCE_S
        for found, data in self.events():
            if found == name and holds(data):
                return data
            assert time.monotonic() < end_s, f"no such {name}"
        raise AssertionError(f"the stream ended before {name}: {self.text[-500:]}")


@contextlib.contextmanager
def reading(url: str, query: str = "", **headers: str) -> Iterator[Reader]:
    """Open the stream."""
    with (
        httpx.Client(timeout=PATIENCE_S) as http,
        http.stream("GET", f"{url}/v1/orla/events{query}", headers=headers) as response,
    ):
        yield Reader(response)
