"""A pool under test: one engine with a bound, a core, replicas by relays; and what happened to calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import NamedTuple, Self

from bench.lib.figures import table
from orla_lg_llamacpp.embedded import free_port
from tests.scripted_engine import MODEL
from tests.serve_kills.processes import PATIENCE_S, Core, Engine, Replica, until
from tests.serve_kills.relays import Relay, Relays

BOUND = 8
CORE_LEASE_S = 1.5
LATE_S = 1.0
"""How much later than the others a replica finds the next core, where one is made late; within its lease."""
CONFIG = """
[backends.main]
url = "{url}"
model = "{model}"
engine = "vllm"
max_concurrency = {bound}
[mapping]
"*" = "main"
[serve]
store = "{store}"
core_lease_s = {core_lease_s}
replica_lease_s = {replica_lease_s}
advertise = ["http://127.0.0.1:9"]
"""
"""Nothing answers at what the core advertises: replicas reach it by their relays alone, and are made late there."""
CONTROL = "tests.serve_kills.hasty_core"


class Row(NamedTuple):
    """What happened to the calls of one kind of fault."""

    kind: str
    faults: int
    calls: int
    cut: int
    """Under way in a replica that was killed: its runner's to repeat."""
    errors: Counter[str]
    lost: int
    twice: int
    gap_s: float
    """The longest time in which no call ended."""
    most: int

    def shown(self) -> list[str]:
        errors = "; ".join(f"{times} {name}" for name, times in self.errors.items()) or "0"
        counts = [f"{self.faults}", f"{self.calls:,}", f"{self.cut}", errors, f"{self.lost}", f"{self.twice}"]
        return [self.kind, *counts, f"{self.gap_s:.1f}", f"{self.most} of {BOUND}"]


def shown(rows: Sequence[Row]) -> str:
    """Return the table."""
    head = ("fault", "times", "calls", "cut with their replica", "errors", "lost", "sent twice",
            "longest without an end, s", "most at once")  # fmt: skip
    return "\n".join(table(head, (row.shown() for row in rows)))


class Pool:
    """All of it; what it started ends with it."""

    core: Core

    def __init__(self, folder: Path, replicas: int, callers: int) -> None:
        self.folder, self._many, self._callers = folder, replicas, callers
        self.config = folder / "orla.toml"
        self.boot_s = 0.0
        """What a core takes from its start until it is ready, here and now."""
        self.replicas: list[Replica] = []
        self.all: list[Replica] = []
        """Those that were killed, too."""
        self._relays: dict[str, Relay] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.engine = stack.enter_context(Engine(self.folder))
            self.relays = stack.enter_context(Relays(free_port()))
            stack.callback(self._kill_all)
            self._write()
            began_s = time.monotonic()
            self.start_core().await_ready()
            self.boot_s = time.monotonic() - began_s
            self.core.kill()
            self._write()
            self.start_core().await_ready()
            for _ in range(self._many):
                self.start_replica()
            for each in self.replicas:
                each.await_ready()
            self._stack = stack.pop_all()
        return self

    def _kill_all(self) -> None:
        for each in (*self.all, self.core):
            each.kill()

    def end(self) -> None:
        """Let what is under way end, and with it the replicas."""
        for each in self.replicas:
            each.calls_take(0.01)
            each.stop()
        for each in self.replicas:
            each.await_end()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def replica_lease_s(self) -> float:
        """Longer than any outage that is made here, so that nobody is cut off unless that is meant."""
        return 2 * self.boot_s + LATE_S + 1.0

    @property
    def long_s(self) -> float:
        """What calls take that outlive the outage and the lateness together."""
        return 1.5 * self.boot_s + LATE_S + 1.5

    def _write(self) -> None:
        self.config.write_text(CONFIG.format(
            url=self.engine.url, model=MODEL, bound=BOUND, store=self.folder / "state.db",
            core_lease_s=CORE_LEASE_S, replica_lease_s=self.replica_lease_s,
        ))  # fmt: skip

    def start_core(self, module: str = "orla_lg") -> Core:
        """Start the core, or another one after it, on the same port; nothing is waited for."""
        self.core = Core(self.config, self.relays.core_port, module)
        return self.core

    def start_replica(self) -> Replica:
        name = f"r{len(self.all)}"
        relay = self._relays[name] = self.relays.open()
        replica = Replica(name, relay.port, self.engine.url, self.folder, "--callers", str(self._callers),
                          seed=len(self.all))  # fmt: skip
        self.replicas.append(replica)
        self.all.append(replica)
        return replica

    def kill_replica(self, replica: Replica) -> None:
        self.replicas.remove(replica)
        replica.kill()

    def shut(self, replica: Replica, seconds: float = inf) -> None:
        """Let a replica's connections get nowhere for so long from now."""
        self._relays[replica.name].shut_until_s = time.monotonic() + seconds

    def calls_take(self, seconds: float, *, full: bool = False) -> None:
        """Let calls take so long at the engine, and wait until such calls are there (a *full* engine's worth)."""
        old = {call for each in self.replicas for call in each.open_calls()}
        for each in self.replicas:
            each.calls_take(seconds)
        until(lambda: not old & self.open_calls(), "earlier calls ended")
        if full:
            self.await_full()

    def await_full(self) -> None:
        until(lambda: self.engine.account()["running"] >= BOUND, "the engine is full")

    def open_calls(self) -> set[str]:
        return {call for each in self.replicas for call in each.open_calls()}

    def ended_since(self, moment_s: float) -> int:
        return sum(when >= moment_s for each in self.all for when in list(each.ended.values()))

    def await_flow(self, calls: int = 10) -> None:
        """Wait until so many calls have ended from now on."""
        now = time.monotonic()
        until(lambda: self.ended_since(now) >= calls, f"{calls} calls end\n{self.core.said()}")


class Watch:
    """The account of what happens to calls between its begin and ``row``."""

    def __init__(self, pool: Pool, kind: str) -> None:
        self._pool, self._kind, self._began_s = pool, kind, time.monotonic()
        self._twice = len(pool.engine.account("?anew")["twice"])
        self._killed = {each.name for each in pool.all if each.killed}
        self.faults = 0

    def row(self) -> Row:
        """Wait for the ends of the calls under way, and return what happened."""
        pool, began_s = self._pool, self._began_s
        under_way, end_s = pool.open_calls(), time.monotonic() + PATIENCE_S + 4 * pool.long_s
        while time.monotonic() < end_s and under_way & pool.open_calls():
            time.sleep(0.02)
        account = pool.engine.account()
        ended = sorted(when for each in pool.all for when in list(each.ended.values()) if when >= began_s)
        errors = Counter(text.partition(":")[0] for each in pool.all for when, text in each.errors if when >= began_s)
        cut = sum(
            len(each.begun) - len(each.ended) for each in pool.all if each.killed and each.name not in self._killed
        )
        gap_s = max((after - before for before, after in pairwise([began_s, *ended])), default=0.0)
        return Row(self._kind, self.faults, len(ended), cut, errors, len(under_way & pool.open_calls()),
                   len(account["twice"]) - self._twice, gap_s, account["most"])  # fmt: skip
