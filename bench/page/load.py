"""Calls that wait by the thousand at a server of its own process, and what watching them costs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import psutil

from orla_lg.testing.faults import Reply
from tests.serve.processes import serving, until_ready
from tests.stub_engine import StubEngine

STAGES = 12
PLACES = 16
PROBES = 20
"""Stages ``new-0`` and so on, whose calls go to an engine that is free."""
ANSWER_S = 0.4
"""So the engine ends 40 calls a second."""

CONFIG = """
[backends.main]
url = "{url}"
max_concurrency = {places}
[backends.free]
url = "{free}"
[mapping]
{probes}
"*" = "main"
[serve]
listen_address = "127.0.0.1:0"
"""


@dataclass
class Loaded:
    """A server under load."""

    url: str
    process: psutil.Process

    def state(self) -> dict[str, object]:
        """Return the backend's state."""
        found: dict[str, object] = httpx.get(f"{self.url}/v1/orla/state").json()["state"]["backends"]["main"]
        return found

    def cpu_of(self, seconds: float) -> float:
        """Return how much of a core the server takes, over so many seconds."""
        before, begun_s = self.process.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after = self.process.cpu_times()
        used_s = after.user + after.system - before.user - before.system
        return used_s / (time.monotonic() - begun_s)


@contextlib.contextmanager
def loaded(waiting: int, workflows: int) -> Iterator[Loaded]:
    """Serve, with so many calls waiting all the time, of so many workflows."""
    with tempfile.TemporaryDirectory() as name, StubEngine() as slow, StubEngine() as free:
        folder = Path(name)
        for engine in (slow, free):
            engine.keep_log = False
        slow.rule = lambda seen: Reply(before_s=ANSWER_S)
        probes = "\n".join(f'"new-{number}" = "free"' for number in range(PROBES))
        config = CONFIG.format(url=slow.url, free=free.url, places=PLACES, probes=probes)
        (folder / "orla.toml").write_text(config, encoding="utf-8")
        with serving(folder, ()) as served:
            until_ready(served)
            ending = threading.Event()
            target = _keep_waiting(served.url, waiting + PLACES, workflows, ending)
            thread = threading.Thread(target=lambda: asyncio.run(target), daemon=True)
            thread.start()
            found = Loaded(served.url, psutil.Process(served.process.pid))
            while int(str(found.state()["waiting"])) < waiting:
                time.sleep(0.2)
            try:
                yield found
            finally:
                ending.set()
                thread.join(30.0)


async def _keep_waiting(url: str, calls: int, workflows: int, ending: threading.Event) -> None:
    """Have so many calls there until the end: each that ends is followed by another."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as http:

        async def one(number: int) -> None:
            body = {"model": "auto", "messages": [{"role": "user", "content": f"{number}"}], "max_tokens": 4}
            headers = {"x-orla-workflow-run": f"workflow-{number % workflows}"}
            turn = 0
            while not ending.is_set():
                turn += 1
                headers["x-orla-stage"] = f"stage-{(number + turn) % STAGES}"
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
                        await answer.read()

        tasks = [asyncio.get_running_loop().create_task(one(number)) for number in range(calls)]
        await asyncio.to_thread(ending.wait)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class Readers:
    """So many pages without a browser: each reads its stream."""

    def __init__(self, url: str, count: int) -> None:
        self.bytes = 0
        self.messages = 0
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(url,), daemon=True) for _ in range(count)]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        time.sleep(2.0)  # what a page gets at its beginning is another figure
        self.bytes = self.messages = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(10.0)

    def _read(self, url: str) -> None:
        with httpx.Client(timeout=30.0) as http, http.stream("GET", f"{url}/v1/orla/events") as stream:
            for piece in stream.iter_raw():
                self.bytes += len(piece)
                self.messages += piece.count(b"\nevent:") + 1
                if self._ending.is_set():
                    return


def first_bytes(url: str) -> int:
    """Return how much a page gets at its beginning."""
    size = 0
    with httpx.Client(timeout=30.0) as http, http.stream("GET", f"{url}/v1/orla/events") as stream:
        for line in stream.iter_lines():
            size += len(line) + 1
            if line.startswith("data: ") and '"all":true' in line and "rows" in json.loads(line[6:]):
                return size
    return size
