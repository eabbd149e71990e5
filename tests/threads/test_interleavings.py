"""Two owners of a thread in virtual time, at random: what either writes, it writes as the owner.

Each reads, writes, is frozen and thawed, and ends; time passes, leases run out and are taken over. No write of an
owner that was followed is kept after the next one has read, whatever the order.
"""

from __future__ import annotations

import contextlib
import sqlite3
from contextlib import ExitStack
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver

from orla_lg import ThreadBusy, ThreadLost
from orla_lg.graph.threads import leases as leases_module
from orla_lg.graph.threads import owners, tables, waiting
from orla_lg.serve.store.store import Instant, MemoryStore
from tests.threads.savers import leased

TTL_S = 30.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def instant(self) -> Instant:
        return Instant(self.now_s, "boot", self.now_s)


class Loop:
    """What LangGraph's loop is to a saver."""

    def __init__(self, run: str) -> None:
        self.stack, self.manager = ExitStack(), SimpleNamespace(run_id=run)


class Owner:
    """A process that runs on the thread, one run after the other."""

    def __init__(self, name: str, saver: Any) -> None:
        self.name, self.saver = name, saver
        self.context = copy_context()
        self.loop: Loop | None = None
        self.config: dict[str, Any] = {}
        self.frozen = False
        self.runs = self.written = 0
        self.saver._leases._renew_aside = self._renews(saver._leases._renew_aside)

    def _renews(self, renew: Any) -> Any:
        return lambda held: None if self.frozen else renew(held)

    def reads(self) -> bool:
        """Begin a run; returns whether the thread was had."""
        self.runs += 1
        loop, control = Loop(f"{self.name}{self.runs}"), object()
        runtime = SimpleNamespace(control=control)
        self.config = {"configurable": {"thread_id": "t", "checkpoint_ns": "", "__pregel_runtime": runtime}}
        owners.beginning_loop = lambda: loop  # type: ignore[assignment, return-value]
        try:
            copy_context().run(self.saver.get_tuple, self.config)
        except ThreadBusy:
            return False
        self.loop = loop
        return True

    def writes(self) -> str | None:
        """Write a checkpoint; returns its id, ``None`` if it was refused."""
        self.written += 1
        name = f"{self.name}{self.runs}.{self.written:06}"
        try:
            self.saver.put(self.config, {**empty_checkpoint(), "id": name}, {"source": "loop", "step": 1}, {})
        except ThreadLost:
            return None
        return name

    def ends(self) -> None:
        assert self.loop is not None
        self.loop.stack.close()
        self.loop = None


WHAT = ["reads", "reads", "writes", "writes", "ends", "frozen 31", "frozen 16", "passes 9"]
STEPS = st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, 1)), min_size=8, max_size=30)
"""What is done, and by which of the two; seconds pass for both. What one does after it was frozen it does at once,
before anything is renewed."""

FOLLOWED: Any = [("reads", 0), ("frozen 31", 0), ("reads", 1), ("writes", 0), ("writes", 1)]
FOLLOWED_BY_ONE_THAT_ENDED: Any = [*FOLLOWED[:3], ("writes", 1), ("ends", 1), ("writes", 0)]


def savers(kind: str, clock: Clock, stack: ExitStack) -> list[Any]:
    if kind == "database":
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        stack.callback(connection.close)
        return [leased(SqliteSaver(connection), thread_lease_s=TTL_S) for _ in range(2)]
    store, memory = MemoryStore(now=clock.instant), InMemorySaver()
    return [leased(memory, thread_lease_s=TTL_S, store=store) for _ in range(2)]


@contextlib.contextmanager
def virtual() -> Any:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patched, ExitStack() as stack:
        for module in (leases_module, tables, waiting):
            patched.setattr(module, "since_boot", clock)
        patched.setattr(waiting, "is_gone", lambda host, pid: False)
        patched.setattr(leases_module, "_renews", lambda *_: None)  # the test looks, and no thread
        patched.setattr(owners, "beginning_loop", owners.beginning_loop)
        yield clock, stack
    owners.UNFINISHED.clear()


@pytest.mark.parametrize("kind", ["database", "store"])
@settings(max_examples=300)
@example(steps=FOLLOWED)
@example(steps=FOLLOWED_BY_ONE_THAT_ENDED)
@given(steps=STEPS)
def test_an_owner_that_was_followed_writes_nothing_more(kind: str, steps: list[tuple[str, int]]) -> None:
    with virtual() as (clock, stack):
        pair = [Owner(name, saver) for name, saver in zip("ab", savers(kind, clock, stack), strict=True)]
        latest: Owner | None = None
        for what, which in steps:
            each, (what, _, seconds) = pair[which], what.partition(" ")
            each.frozen = what == "frozen"
            for _ in range(int(seconds or 0)):
                clock.now_s += 1.0
                for one in pair:
                    one.saver._leases.look()
            each.frozen = False
            if what == "reads" and each.loop is None:
                if each.reads():
                    latest = each
            elif what == "writes" and each.loop is not None:
                name = each.writes()
                assert (name is not None) == (latest is each), "the owner's is kept, and no other"
                stored = {
                    found.checkpoint["id"] for found in each.saver.inner.list({"configurable": {"thread_id": "t"}})
                }
                assert name in stored if name else f"{each.name}{each.runs}.{each.written:06}" not in stored
            elif what == "ends" and each.loop is not None:
                each.ends()
        for each in pair:
            if each.loop is not None:
                each.ends()


def test_one_that_is_awake_is_never_followed() -> None:
    with virtual() as (clock, stack):
        first, second = (Owner(name, saver) for name, saver in zip("ab", savers("store", clock, stack), strict=True))
        assert first.reads()
        for _ in range(200):
            clock.now_s += 1.0
            first.saver._leases.look()
            assert not second.reads()
        assert first.writes()


def test_what_remains_where_the_write_does_not_compare() -> None:
    """A process that is frozen between its look and its write, for longer than its lease, writes too late."""
    with virtual() as (clock, stack):
        first, second = (Owner(name, saver) for name, saver in zip("ab", savers("store", clock, stack), strict=True))
        assert first.reads()
        put = first.saver.inner.put

        def frozen(*args: Any) -> Any:
            first.saver.inner.put = put
            first.frozen = True
            clock.now_s += TTL_S + 1
            assert second.reads()
            return put(*args)

        first.saver.inner.put = frozen
        assert first.writes(), "this is what is said of such savers; in a database it is refused"


def test_in_a_database_nothing_remains() -> None:
    with virtual() as (clock, stack):
        first, second = (
            Owner(name, saver) for name, saver in zip("ab", savers("database", clock, stack), strict=True)
        )
        assert first.reads()
        serde = first.saver.inner.serde
        dumps = serde.dumps_typed

        def frozen(value: Any) -> Any:
            serde.dumps_typed = dumps
            first.frozen = True
            clock.now_s += TTL_S + 1
            assert second.reads()
            return dumps(value)

        serde.dumps_typed = frozen
        assert first.writes() is None
