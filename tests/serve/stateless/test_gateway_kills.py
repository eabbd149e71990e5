"""Gateways and cores that are killed: calls wait and flow again, places come back, the bound holds."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.serve.processes import PATIENCE_S, Served, serving, until_ready
from tests.stub_engine import Gate, Reply, StubEngine

BOUND = 2
CALL = {"model": "light", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.slow


def until(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


class Callers:
    """Callers of several gateways, one call after the other each, until the block ends."""

    def __init__(self, urls: list[str], each: int) -> None:
        self.statuses: list[int | str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(url,)) for url in urls for _ in range(each)]

    def _call(self, url: str) -> None:
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not self._ended.is_set():
                try:
                    self.statuses.append(client.post(url + CHAT, json=CALL).status_code)
                except httpx.HTTPError as error:
                    self.statuses.append(type(error).__name__)

    def flow(self, more: int = 20) -> None:
        """Wait until so many more calls have ended."""
        until_ended = len(self.statuses) + more
        until(lambda: len(self.statuses) >= until_ended)

    def __enter__(self) -> Callers:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for each in self._threads:
            each.join(PATIENCE_S)


@pytest.fixture
def house(tmp_path: Path, engine: StubEngine) -> Iterator[tuple[list[Served], list[Served]]]:
    """A core with a standby, and two gateways."""
    engine.rule = lambda seen: Reply(before_s=0.02)
    (tmp_path / "orla.toml").write_text(
        f'[backends.light]\nurl = "{engine.url}"\nmax_concurrency = {BOUND}\n[serve]\nstore = "serve.db"\n'
        "core_lease_s = 1.0\nreplica_lease_s = 2.0\n"
    )
    with ExitStack() as stack:
        core = stack.enter_context(serving(tmp_path, ["--port", "0", "--config", "orla.toml"]))
        until_ready(core)
        standby = stack.enter_context(serving(tmp_path, ["--port", "0", "--config", "orla.toml", "--standby"]))
        words = ["--port", "0", "--gateway", "--core", f"{core.url},{standby.url}"]
        with ThreadPoolExecutor(2) as pool:
            started = [pool.submit(stack.enter_context, serving(tmp_path, words)) for _ in range(2)]
            yield [core, standby], [each.result() for each in started]


def test_a_core_and_a_gateway_are_killed(house: tuple[list[Served], list[Served]], engine: StubEngine) -> None:
    (core, standby), (one, other) = house
    with Callers([one.url, other.url], 3) as callers:
        callers.flow()
        core.signal(signal.SIGKILL)
        killed_s = time.monotonic()
        callers.flow()
        assert time.monotonic() - killed_s < 30
    assert set(callers.statuses) == {200} and engine.peak <= BOUND
    assert standby.is_ready() and one.is_ready()
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with ThreadPoolExecutor(3) as pool:
        lost = [pool.submit(httpx.post, other.url + CHAT, json=CALL, timeout=PATIENCE_S) for _ in range(BOUND)]
        until(lambda: engine.in_flight == BOUND)
        waits = pool.submit(httpx.post, one.url + CHAT, json=CALL, timeout=PATIENCE_S)
        other.signal(signal.SIGKILL)
        assert all(each.exception() is not None for each in lost)
        until(lambda: engine.in_flight == 1)  # the places are given on
        gate.open()
        assert waits.result().status_code == 200
    assert engine.peak <= BOUND
