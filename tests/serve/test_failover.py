"""A core is killed, frozen or restarted, and its standby goes on: real processes, one store.

The replica is this process; it was given the URL of one core and no other. What a fault costs is the longest time
without the end of a call, of callers that never stop asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg import Orla
from orla_lg.serve.store.opening import store_at
from orla_lg_llamacpp.embedded import free_port
from tests.redis_server import RedisServer
from tests.serve.processes import PATIENCE_S, Served, environment, serving
from tests.serve.replica import graph_of
from tests.stub_engine import Gate, Reply, Seen, StubEngine

BOUND, CALLERS = 2, 4
CONFIG = """
[backends.main]
url = "{url}"
max_concurrency = {bound}
[mapping]
"*" = "main"
[serve]
store = "{store}"
replica_lease_s = 3
"""
BLIND, HASTY = "tests.serve.blind_core", "tests.serve_kills.hasty_core"


def until(condition: Any, why: str = "", patience_s: float = PATIENCE_S) -> Any:
    until_s = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < until_s, why
        time.sleep(0.005)
    return found


class Fleet:
    """One engine, one store, and the servers that decide for it one after the other."""

    def __init__(self, folder: Path, engine: StubEngine, store: str = "state/serve.db") -> None:
        self.folder, self.engine, self.store = folder, engine, store
        self.servers: list[Served] = []
        self._stack = contextlib.ExitStack()
        folder.joinpath("orla.toml").write_text(CONFIG.format(url=engine.url, bound=BOUND, store=store))

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        for each in self.servers:
            if each.process.poll() is None:
                each.signal(signal.SIGCONT)
        self._stack.close()

    def start(self, module: str = "orla_lg") -> Served:
        words = ("--port", str(free_port()), "--standby")
        started = self._stack.enter_context(serving(self.folder, words, module))
        self.servers.append(started)
        return started

    @property
    def alive(self) -> list[Served]:
        return [each for each in self.servers if each.process.poll() is None]

    def core(self) -> Served:
        """Return the one that decides."""
        return until(lambda: next((each for each in self.alive if is_ready(each)), None), "none decides")

    def standbys(self, many: int, module: str = "orla_lg") -> list[Served]:
        """Return so many standbys, started if need be; those of another module than wanted are ended."""
        core = self.core() if self.alive else self.start(module)
        for each in self.alive:
            if each is not core and getattr(each, "module", "orla_lg") != module:
                each.process.kill()
                each.process.wait()
        while len(self.alive) < many + 1:
            self.start(module).module = module  # type: ignore[attr-defined]
        core = self.core()
        return [each for each in self.alive if each is not core]

    def standing_by(self) -> int:
        """Return how many standbys the directory has."""
        with contextlib.closing(store_at(str(self.folder / self.store), "store")) as store:
            return len(store.scan("standby/"))

    @contextlib.contextmanager
    def replica(self, url: str | None = None) -> Iterator[Orla]:
        """Give a replica that was given the core's URL alone, and has heard of all standbys."""
        self.engine.rule, self.engine.peak = None, 0
        with Orla.remote(url or self.core().url) as orla:
            places = orla.core.serving.link.places  # type: ignore[attr-defined]
            wanted = {each.url for each in self.alive}
            until(lambda: {each.text for each in places.addresses()} == wanted, "it hears of the standbys")
            yield orla


def is_ready(served: Served) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return served.process.poll() is None and httpx.get(f"{served.url}/readyz", timeout=0.5).is_success
    return False


def kill(served: Served) -> None:
    os.kill(served.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with StubEngine() as engine, Fleet(tmp_path_factory.mktemp("fleet"), engine) as fleet:
        yield fleet


@pytest.fixture
def fleet_on_redis(tmp_path: Path) -> Iterator[Fleet]:
    with RedisServer(tmp_path / "redis") as server, StubEngine() as engine:
        tmp_path.joinpath("fleet").mkdir()
        with Fleet(tmp_path / "fleet", engine, f"{server.url}?prefix=test") as fleet:
            yield fleet


class Flow:
    """Callers that never stop asking while the block runs, and when their calls ended."""

    def __init__(self, orla: Orla) -> None:
        self._graph = graph_of(orla, "main")
        self._over = threading.Event()
        self.ended: list[float] = []
        self.faults: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CALLERS)]

    def _ask(self, number: int) -> None:
        async def asking() -> None:
            while not self._over.is_set():
                try:
                    await self._graph.ainvoke({"messages": [("user", f"caller {number}")]})
                except Exception as error:  # whatever it is, no call may end so
                    self.faults.append(error)
                    return
                self.ended.append(time.monotonic())

        asyncio.run(asking())

    def __enter__(self) -> Flow:
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.ended) > 20, "calls flow")
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def gap_s(self, since_s: float, what: str) -> float:
        """Wait until calls flow again after a fault, and return the longest time in which none ended."""

        def flows() -> bool:
            after = sum(each > since_s + 0.01 for each in list(self.ended))
            return after > 20 and time.monotonic() > since_s + 0.4

        until(flows, f"calls flow again after {what}; {self.faults}")
        marks = [since_s, *sorted(each for each in list(self.ended) if each > since_s)]
        gap_s = max(after - before for before, after in pairwise(marks))
        assert not self.faults, self.faults
        print(f"\n{what}: calls flow again after {gap_s:.2f} s")
        return gap_s


def test_a_killed_core_is_followed_at_once_on_its_own_machine(fleet: Fleet) -> None:
    fleet.standbys(1)
    with fleet.replica() as orla, Flow(orla) as flow:
        core, began_s = fleet.core(), time.monotonic()
        kill(core)
        assert flow.gap_s(began_s, "a kill, the standby on the same machine") < 2.0
        assert core.process.wait() == -signal.SIGKILL and fleet.engine.peak <= BOUND


def test_a_killed_core_is_followed_within_two_seconds_from_another_machine(fleet: Fleet) -> None:
    fleet.standbys(1, BLIND)
    with fleet.replica() as orla, Flow(orla) as flow:
        core, began_s = fleet.core(), time.monotonic()
        kill(core)
        assert flow.gap_s(began_s, "a kill, the standby elsewhere") < 2.5, "1.5 s of lease, and the way here"
        core.process.wait()
        assert fleet.engine.peak <= BOUND


def test_a_frozen_core_is_followed_and_stands_by_when_it_thaws(fleet: Fleet) -> None:
    (standby,) = fleet.standbys(1)
    with fleet.replica() as orla, Flow(orla) as flow:
        core, began_s = fleet.core(), time.monotonic()
        core.signal(signal.SIGSTOP)
        assert flow.gap_s(began_s, "a core frozen") < 5.0
        assert is_ready(standby)
        core.signal(signal.SIGCONT)
        core.until("it begins again as a standby")
        until(lambda: fleet.standing_by() == 1, "it stands by again")
        assert core.process.poll() is None and not is_ready(core) and is_ready(standby)
        more, ended = len(flow.ended), flow.ended
        until(lambda: len(ended) > more + 20, "and calls flow on")
        assert not flow.faults and fleet.engine.peak <= BOUND


def test_a_replica_that_was_given_the_store_follows_there(fleet_on_redis: Fleet) -> None:
    fleet = fleet_on_redis
    fleet.standbys(1, BLIND)
    with fleet.replica(fleet.store) as orla, Flow(orla) as flow:
        core, began_s = fleet.core(), time.monotonic()
        kill(core)
        assert flow.gap_s(began_s, "a kill, the store on Redis, the standby elsewhere") < 2.5
        core.process.wait()
        assert fleet.engine.peak <= BOUND


def test_in_a_rolling_restart_calls_hardly_wait(fleet: Fleet) -> None:
    fleet.standbys(1)
    with fleet.replica() as orla, Flow(orla) as flow:
        core, began_s = fleet.core(), time.monotonic()
        core.signal(signal.SIGTERM)
        assert flow.gap_s(began_s, "a restart") < 1.5
        assert core.wait() == 0 and fleet.engine.peak <= BOUND


def test_of_two_standbys_one_follows_and_then_the_other(fleet: Fleet) -> None:
    fleet.standbys(2)
    with fleet.replica() as orla, Flow(orla) as flow:
        for _ in range(2):
            core, began_s = fleet.core(), time.monotonic()
            kill(core)
            flow.gap_s(began_s, "a kill, with two standbys")
            core.process.wait()
            assert sum(map(is_ready, fleet.alive)) == 1
        assert len(fleet.alive) == 1 and fleet.engine.peak <= BOUND


def test_what_waits_keeps_its_order(fleet: Fleet) -> None:
    fleet.standbys(1)
    engine, gates = fleet.engine, [Gate() for _ in range(BOUND + 4)]
    with fleet.replica() as orla, ThreadPoolExecutor(len(gates)) as pool:
        graph, asked, begun = graph_of(orla, "main"), list[Future[Any]](), len(engine.chats)

        def number(seen: Seen) -> int:
            return int(seen.body["messages"][-1]["content"].split()[1])

        engine.rule = lambda seen: Reply(gate=gates[number(seen)])
        for each in range(len(gates)):
            said = {"messages": [("user", f"number {each}")]}
            asked.append(pool.submit(asyncio.run, graph.ainvoke(said)))
            until(lambda each=each: known(orla) == each + 1, "it is known to the core")
        kill(core := fleet.core())
        core.process.wait()
        until(lambda: known(orla) == len(gates), "the next core knows them all")
        assert engine.in_flight == BOUND
        for done, gate in enumerate(gates, 1):
            gate.open()
            there = min(BOUND + done, len(gates))
            until(lambda there=there: len(engine.chats) - begun == there, "the next one goes")
        assert all(each.result(PATIENCE_S)["messages"] for each in asked)
        assert [number(seen) for seen in engine.chats[begun + BOUND :]] == list(range(BOUND, len(gates)))
        assert engine.peak <= BOUND


def known(orla: Orla) -> int:
    """Return how many calls the core has, waiting or granted."""
    queue = orla.statistics().backends["main"].queue
    return queue.waiting + queue.in_flight


@contextlib.contextmanager
def frozen_with_calls_at_the_engine(fleet: Fleet) -> Iterator[subprocess.Popen[str]]:
    """Give a replica in a process of its own that holds all places at the engine, and stands still."""
    words = [sys.executable, "-m", "tests.serve.replica", fleet.core().url]
    environ = environment(fleet.folder)
    with subprocess.Popen(words, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            assert "ready" in process.stdout.readline()
            process.stdin.write(json.dumps({"model": "main", "calls": BOUND, "say": "held"}) + "\n")
            process.stdin.flush()
            until(lambda: fleet.engine.in_flight == BOUND, "its calls are at the engine")
            process.send_signal(signal.SIGSTOP)
            yield process
            process.send_signal(signal.SIGCONT)
            assert json.loads(process.stdout.readline()) == {"said": ["well"] * BOUND}
        finally:
            process.kill()


@pytest.mark.parametrize("module", ["orla_lg", HASTY], ids=["as it is", "control: nothing is waited for"])
def test_what_a_frozen_replica_holds_is_not_given_away(fleet: Fleet, module: str) -> None:
    fleet.standbys(1, module)
    engine, gate = fleet.engine, Gate()
    with fleet.replica() as orla, ThreadPoolExecutor(BOUND) as pool:
        engine.rule = lambda seen: Reply(gate=gate)
        graph = graph_of(orla, "main")
        with frozen_with_calls_at_the_engine(fleet) as frozen:
            waiting = [
                pool.submit(asyncio.run, graph.ainvoke({"messages": [("user", f"{number}")]}))
                for number in range(BOUND)
            ]
            until(lambda: known(orla) == 2 * BOUND, "they wait")
            core = fleet.core()
            kill(core)
            core.process.wait()
            fleet.core()
            if module == HASTY:
                until(lambda: engine.peak > BOUND, "the control must fail, else the other run proves nothing")
            else:
                time.sleep(1.0)
                assert engine.peak == BOUND
            frozen.send_signal(signal.SIGCONT)
            gate.open()
        assert all(each.result(PATIENCE_S)["messages"] for each in waiting)
        assert module == HASTY or engine.peak == BOUND
