"""Four processes of wrapped graphs at one ``orla-lg serve``: what holds in one process holds over all of them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from orla_lg import Orla
from orla_lg.serve.settings import DEFAULT_PORT
from orla_lg.testing.faults import FaultEngine
from tests.serve.processes import PATIENCE_S, ROOT, environment, serving, until_ready
from tests.serve.replica import done
from tests.stub_engine import Gate, Reply, StubEngine

REPLICAS, BOUND = 4, 8
SYSTEM = "word " * 3000


class Replica:
    """A process of ``tests.serve.replica``."""

    def __init__(self, where: str, folder: Path, number: int) -> None:
        env = {**environment(folder), "PYTHONHASHSEED": str(number + 1)}
        words = [sys.executable, "-m", "tests.serve.replica", where]
        self.process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the next line; its process is killed if that does not come."""
        assert self.process.stdout is not None
        late = threading.Timer(PATIENCE_S, self.process.kill)
        late.start()
        try:
            return dict(json.loads(self.process.stdout.readline()))
        finally:
            late.cancel()

    def end(self) -> None:
        """Let it end, which takes a moment."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdout is not None
        self.end()
        try:
            self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10.0)
        self.process.stdout.close()


@contextmanager
def replicas(where: str, folder: Path) -> Iterator[list[Replica]]:
    with ExitStack() as stack:
        made = [stack.enter_context(Replica(where, folder, number)) for number in range(REPLICAS)]
        for each in made:
            assert each.answer()["ready"]
        yield made
        for each in made:
            each.end()


def all_at_once(processes: list[Replica], **order: Any) -> list[dict[str, Any]]:
    for each in processes:
        each.ask(**order)
    return [each.answer() for each in processes]


@dataclass
class House:
    """Engines, and a server before them with four processes."""

    wide: StubEngine
    narrow: StubEngine
    shared: FaultEngine
    url: str
    processes: list[Replica]
    file: Path


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    shared = FaultEngine(any_model=True, context_tokens=None, prefix_cache=True)
    with StubEngine() as wide, StubEngine() as narrow, shared:
        wide.rule = lambda seen: Reply(before_s=0.05)
        file = folder / "orla.toml"
        file.write_text(f"""
policy = "priority"
[backends.wide]
url = "{wide.url}"
max_concurrency = {BOUND}
[backends.narrow]
url = "{narrow.url}"
max_concurrency = 1
[backends.shared]
url = "{shared.url}"
[limits.tenants.acme]
calls = 10
[serve]
listen_address = "127.0.0.1:0"
""")
        with serving(folder, ()) as served:
            until_ready(served)
            with replicas(served.url, folder) as processes:
                yield House(wide, narrow, shared, served.url, processes, file)


def waiting(orlas: list[Orla], backend: str, calls: int) -> None:
    """Wait until so many calls wait for a backend."""
    for _ in range(1000):
        if sum(orla.statistics().backends[backend].queue.waiting for orla in orlas) == calls:
            return
        time.sleep(0.02)
    raise AssertionError([orla.statistics().backends[backend].queue for orla in orlas])


def test_the_engine_sees_the_bound_over_all(house: House) -> None:
    house.wide.peak = 0
    answers = all_at_once(house.processes, model="wide", calls=12, say="hello")
    assert [each["said"] for each in answers] == [["well"] * 12] * REPLICAS
    assert house.wide.peak == BOUND


def test_a_prefix_that_all_share_is_prefilled_once(house: House) -> None:
    """Whatever ``PYTHONHASHSEED`` a process has: the others wait for the one that prefills it."""
    gate = Gate()
    house.shared.rule = lambda seen: Reply(gate=gate)
    with Orla.remote(house.url) as orla:
        for each in house.processes:
            each.ask(model="shared", calls=2, say="question", system=SYSTEM)
        waiting([orla], "shared", 2 * REPLICAS - 1)
    house.shared.wait(lambda engine: engine.in_flight == 1)
    gate.open()
    assert [each.answer()["said"] for each in house.processes] == [["well"] * 2] * REPLICAS


def test_cores_of_their_own_do_neither(house: House) -> None:
    """The control: what four processes did before."""
    gate = Gate()
    house.shared.rule = lambda seen: Reply(gate=gate)

    async def both() -> None:
        async with asyncio.TaskGroup() as tasks:
            for orla in orlas:
                tasks.create_task(done(orla, {}, {"model": "wide", "calls": 12, "say": "hello"}))
        order = {"model": "shared", "calls": 2, "say": "question", "system": f"another {SYSTEM}"}
        async with asyncio.TaskGroup() as tasks:
            for orla in orlas:
                tasks.create_task(done(orla, {}, order))
            await asyncio.to_thread(waiting, orlas, "shared", REPLICAS)
            prefilling.append(house.shared.in_flight)
            gate.open()

    prefilling: list[int] = []
    house.wide.peak = 0
    with ExitStack() as stack:
        orlas = [stack.enter_context(Orla.from_config(house.file)) for _ in range(REPLICAS)]
        asyncio.run(both())
    assert house.wide.peak > 2 * BOUND


def test_order_is_the_policys_over_all(house: House) -> None:
    gate, seen = Gate(), list[str]()

    def rule(request: Any) -> Reply:
        seen.append(request.last)
        return Reply(gate=gate)

    house.narrow.rule = rule
    with Orla.remote(house.url) as orla:
        house.processes[0].ask(model="narrow", calls=1, say="first")
        house.narrow.wait(lambda engine: engine.in_flight == 1)
        for each, priority in zip(house.processes[1:], (4, 9, 7), strict=True):
            config = {"configurable": {"orla": {"priority": priority}}}
            each.ask(model="narrow", calls=2, say=f"priority {priority}", config=config)
        waiting([orla], "narrow", 6)
        gate.open()
        assert all(each.answer()["said"] for each in house.processes)
    assert [each.rpartition(" ")[0] for each in seen] == [
        "first", *["priority 9"] * 2, *["priority 7"] * 2, *["priority 4"] * 2,
    ]  # fmt: skip


def test_limits_hold_over_all(house: House) -> None:
    config = {"configurable": {"orla": {"tenant": "acme"}}}
    answers = all_at_once(house.processes, model="wide", calls=4, say="hello", config=config)
    said = [each for answer in answers for each in answer["said"]]
    assert said.count("well") == 10 and said.count("BudgetExceeded") == 6


def test_the_example_runs_as_its_readme_says(house: House) -> None:
    """With two workers instead of four: each takes seconds to start."""
    folder = ROOT / "examples" / "many_processes"
    command = re.search(
        r"^ORLA_SERVER=(\S+) uvicorn (\S+) --workers 4 --port 8000$", (folder / "README.md").read_text(), re.M
    )
    assert command is not None and command[1] == f"http://127.0.0.1:{DEFAULT_PORT}"
    port = free_port()
    words = [
        sys.executable, "-m", "uvicorn", command[2], "--workers", "2", "--port", str(port), "--log-level", "warning",
    ]  # fmt: skip
    env = {**environment(house.file.parent), "ORLA_SERVER": house.url}
    house.wide.peak = 0
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(words, cwd=folder, env=env)
    try:
        until_s = time.monotonic() + PATIENCE_S
        while not answers(f"{url}/load"):
            assert time.monotonic() < until_s and process.poll() is None
            time.sleep(0.05)
        workers: set[int] = set()
        with ThreadPoolExecutor(24) as pool:
            while len(workers) < 2:  # the second one may be slower to start, and the system shares connections out
                assert time.monotonic() < until_s, workers
                asked = [
                    pool.submit(httpx.post, f"{url}/ask", content=f"{n}?", timeout=PATIENCE_S) for n in range(48)
                ]
                said = [each.result().json() for each in asked]
                assert all(each["answer"] for each in said)
                workers |= {each["worker"] for each in said}
        assert 2 < house.wide.peak <= BOUND
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
