"""What is left halfway: a take of a thread that is cancelled, a write whose lease is not given back, a stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from orla_lg import BackendUnavailable, ThreadBusy
from orla_lg.core.steps import Sleep, Steps, adrive, drive
from orla_lg.graph.threads.leases import ThreadLeases
from orla_lg.graph.threads.registries import StoreRegistry
from orla_lg.link.thread_leases import Taken, ThreadOwner
from orla_lg.serve.store.store import MemoryStore
from tests.threads.savers import AT, HAS_POSTGRES, KINDS, State, atwo, build, leased, two

kinds = pytest.mark.parametrize("kind", KINDS)


def says(state: State) -> dict[str, Any]:
    return {"said": ["done"]}


def leases_of(saver: Any) -> ThreadLeases:
    return saver._leases


class Stalls:
    """Lets a place answer, and the answer wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, saver: Any) -> None:
        registry: Any = leases_of(saver).registry
        take = registry.take
        self.taken = asyncio.Event()

        def stalled(*args: Any) -> Steps:
            answer = yield from take(*args)
            if not self.taken.is_set():
                self.taken.set()
                yield Sleep(3600.0)
            return answer

        monkeypatch.setattr(registry, "take", stalled)


@kinds
async def test_a_run_that_is_cancelled_while_it_takes_its_thread_leaves_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with atwo(kind, tmp_path) as make:
        first, second = await make(), await make()
        stalls = Stalls(monkeypatch, first)
        running = asyncio.ensure_future(build(first, says).ainvoke({"said": []}, AT))  # noqa: TID251 - to be cancelled
        await stalls.taken.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        del running
        await build(first, says).ainvoke({"said": []}, {"configurable": {"thread_id": "other"}})  # settles
        for left in reversed(range(100)):  # the loop that was cancelled may be at it still, though not for a lease
            try:
                await build(second, says).ainvoke({"said": []}, AT)
            except ThreadBusy:
                assert left
                await asyncio.sleep(0.05)
            else:
                break


async def test_a_write_from_outside_that_is_cancelled_while_it_takes_the_thread_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with atwo("store", tmp_path) as make:
        first, second = await make(), await make()
        await build(first, says).ainvoke({"said": []}, AT)
        stalls = Stalls(monkeypatch, first)
        writing = asyncio.ensure_future(build(first, says).aupdate_state(AT, {"said": ["outside"]}))  # noqa: TID251 - to be cancelled
        await stalls.taken.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await build(second, says).ainvoke({"said": []}, AT)


def test_a_write_from_outside_that_was_written_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with two("store", tmp_path) as make:
        saver = make()
        build(saver, says).invoke({"said": []}, AT)
        registry: Any = leases_of(saver).registry

        give_back, times = registry.give_back, iter(range(10))

        def away(*args: Any) -> Steps:
            if next(times):
                raise BackendUnavailable("the store is away")
            yield from give_back(*args)

        monkeypatch.setattr(registry, "give_back", away)
        build(saver, says).update_state(AT, {"said": ["outside"]})
        assert build(saver, says).get_state(AT).values["said"][-1] == "outside"


@kinds
def test_a_stream_that_is_open_and_a_second_run_beside_it(tmp_path: Path, kind: str) -> None:
    with two(kind, tmp_path) as make:
        graph = build(make(), says)
        stream = graph.stream({"said": []}, AT, stream_mode="values")
        next(stream)
        with pytest.raises(ThreadBusy):
            graph.invoke({"said": []}, AT)
        other = {"configurable": {"thread_id": "other"}}
        beside = graph.stream({"said": []}, other, stream_mode="values")
        next(beside)
        stream.close()
        with ThreadPoolExecutor(1) as pool, pytest.raises(ThreadBusy):
            pool.submit(graph.invoke, {"said": []}, other).result()
        beside.close()
        graph.invoke({"said": []}, AT)


@kinds
async def test_a_stream_of_a_loop_that_is_open_and_a_second_run_beside_it(tmp_path: Path, kind: str) -> None:
    async with atwo(kind, tmp_path) as make:
        graph = build(await make(), says)
        stream = graph.astream({"said": []}, AT, stream_mode="values")
        await anext(stream)
        with pytest.raises(ThreadBusy):
            await graph.ainvoke({"said": []}, AT)
        await stream.aclose()
        await graph.ainvoke({"said": []}, AT)


def forked(work: Callable[[], object]) -> int:
    """Do *work* in a forked child; returns its status, which is 0 if all went well."""
    if not (pid := os.fork()):
        signal.alarm(20)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_child_that_was_forked_while_a_lease_was_asked_for_asks_by_itself() -> None:
    registry: Any = StoreRegistry(MemoryStore())
    with registry._leases._lock:

        def takes() -> None:
            registry.forked()
            assert isinstance(drive(registry.take(None, "t", ThreadOwner("x"), 30.0, "")), Taken)

        assert forked(takes) == 0


def test_a_child_opens_a_named_store_for_itself(tmp_path: Path) -> None:
    saver = leased(InMemorySaver(), store=tmp_path / "leases.db")
    build(saver, says).invoke({"said": []}, AT)
    assert forked(lambda: build(saver, says).invoke({"said": []}, AT)) == 0
    build(saver, says).invoke({"said": []}, AT)


@HAS_POSTGRES
def test_no_run_begins_between_a_write_from_outside_and_its_commit(tmp_path: Path) -> None:
    with two("postgres", tmp_path) as make:
        first, second = make(), make()
        build(first, says).invoke({"said": []}, AT)
        registry: Any = leases_of(first).registry
        fenced = drive(registry.fenced(first.inner, "t", ""))
        began, go_on = threading.Event(), threading.Event()
        with ThreadPoolExecutor(2) as pool:

            def writes() -> None:
                with fenced._cursor(pipeline=True) as cursor:
                    cursor.execute("SELECT 1")
                    began.set()
                    go_on.wait(10.0)

            writing = pool.submit(writes)
            assert began.wait(10.0)
            running = pool.submit(build(second, says).invoke, {"said": []}, AT)
            time.sleep(0.5)
            is_over = running.done()
            go_on.set()
            writing.result()
            running.result()
        assert not is_over, "a run read the thread before the write was committed"


async def test_a_cancelled_write_holds_no_lock_of_the_file(tmp_path: Path) -> None:
    async with atwo("sqlite", tmp_path) as make:
        saver = await make()
        await build(saver, says).ainvoke({"said": []}, AT)
        stalled = asyncio.Event()
        fenced: Any = await adrive(leases_of(saver).registry.fenced(saver.inner, "t", ""))

        async def writes() -> None:
            async with fenced.lock, fenced.conn.cursor() as cursor:
                await cursor.execute("SELECT 1")
                stalled.set()
                await asyncio.sleep(3600)

        writing = asyncio.ensure_future(writes())  # noqa: TID251 - to be cancelled
        await stalled.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        with contextlib.closing(sqlite3.connect(tmp_path / "threads.db", timeout=1.0)) as other:
            other.execute("BEGIN IMMEDIATE")
