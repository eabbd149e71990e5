"""What is left halfway: a take of a thread that is cancelled, a write whose lease is not given back, a stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from orla_lg import BackendUnavailable, ThreadBusy
from orla_lg.graph.threads.leases import ThreadLeases
from orla_lg.graph.threads.places import StorePlace
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
        place: Any = leases_of(saver).place
        take = place.atake
        self.taken = asyncio.Event()

        async def atake(*args: Any) -> Any:
            answer = await take(*args)
            if not self.taken.is_set():
                self.taken.set()
                await asyncio.sleep(3600)
            return answer

        monkeypatch.setattr(place, "atake", atake)


@kinds
async def test_a_run_that_is_cancelled_while_it_takes_its_thread_leaves_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with atwo(kind, tmp_path) as make:
        first, second = await make(), await make()
        stalls = Stalls(monkeypatch, first)
        running = asyncio.create_task(build(first, says).ainvoke({"said": []}, AT))
        await stalls.taken.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        del running
        await build(first, says).ainvoke({"said": []}, {"configurable": {"thread_id": "other"}})  # settles
        await build(second, says).ainvoke({"said": []}, AT)


@kinds
async def test_a_write_from_outside_that_is_cancelled_while_it_takes_the_thread_leaves_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with atwo(kind, tmp_path) as make:
        first, second = await make(), await make()
        await build(first, says).ainvoke({"said": []}, AT)
        stalls = Stalls(monkeypatch, first)
        writing = asyncio.create_task(build(first, says).aupdate_state(AT, {"said": ["outside"]}))
        if kind == "store":
            await stalls.taken.wait()
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
        await writing if kind != "store" else None
        await build(second, says).ainvoke({"said": []}, AT)


def test_a_write_from_outside_that_was_written_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with two("store", tmp_path) as make:
        saver = make()
        build(saver, says).invoke({"said": []}, AT)
        place: Any = leases_of(saver).place

        def away(*args: Any) -> None:
            raise BackendUnavailable("the store is away")

        monkeypatch.setattr(place, "give_back", away)
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_that_was_forked_while_a_lease_was_asked_for_asks_by_itself() -> None:
    store = MemoryStore()
    place = StorePlace(store)
    with place._leases._lock:
        pid = os.fork()
        if not pid:
            place.forked()
            with ThreadPoolExecutor(1) as pool, contextlib.suppress(BaseException):
                answer = pool.submit(place.take, None, "t", ThreadOwner("x"), 30.0, "").result(5.0)
                os._exit(0 if isinstance(answer, Taken) else 1)
            os._exit(2)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_opens_a_named_store_for_itself(tmp_path: Path) -> None:
    saver = leased(InMemorySaver(), store=tmp_path / "leases.db")
    build(saver, says).invoke({"said": []}, AT)
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            build(saver, says).invoke({"said": []}, AT)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    build(saver, says).invoke({"said": []}, AT)


@HAS_POSTGRES
def test_no_run_begins_between_a_write_from_outside_and_its_commit(tmp_path: Path) -> None:
    with two("postgres", tmp_path) as make:
        first, second = make(), make()
        build(first, says).invoke({"said": []}, AT)
        place: Any = leases_of(first).place
        fenced = place.fenced(first.inner, "t", "")
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


async def test_a_cancelled_write_holds_no_lock_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with atwo("sqlite", tmp_path) as make:
        saver = await make()
        await build(saver, says).ainvoke({"said": []}, AT)
        connection: Any = saver.inner.conn
        execute, stalled = connection.cursor, asyncio.Event()
        fenced: Any = leases_of(saver).place.fenced(saver.inner, "t", "")
        await fenced.setup()

        async def writes() -> None:
            async with fenced.lock, fenced.conn.cursor() as cursor:
                await cursor.execute("SELECT 1")
                stalled.set()
                await asyncio.sleep(3600)

        writing = asyncio.create_task(writes())
        await stalled.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        with contextlib.closing(sqlite3.connect(tmp_path / "threads.db", timeout=1.0)) as other:
            other.execute("BEGIN IMMEDIATE")
        assert execute
