from __future__ import annotations

import asyncio
import gc
import inspect
import os
import threading
import time
import weakref
from collections.abc import Coroutine
from contextvars import Context, ContextVar
from typing import Any

import pytest

from orla_lg.core.background import Background, is_collecting
from orla_lg.errors import OrlaClosed


async def who() -> str:
    return threading.current_thread().name


def test_what_the_collector_runs_knows_it_and_takes_no_lock() -> None:
    background, lock, ran = Background(), threading.Lock(), threading.Event()
    seen: list[tuple[bool, int]] = []

    def end() -> None:
        with lock:
            seen.append((is_collecting(), threading.get_ident()))
        ran.set()

    class Dropped:
        def __del__(self) -> None:
            seen.append((is_collecting(), threading.get_ident()))
            background.hand_over(end)

    dropped = Dropped()
    dropped.itself = dropped  # type: ignore[attr-defined]  # only the cyclic collector finds it
    del dropped
    background.call_later(0.0, lambda: None)
    with lock:
        gc.collect()
        assert seen == [(True, threading.get_ident())] and not is_collecting()
    assert ran.wait(60) and not seen[1][0] and seen[1][1] != threading.get_ident()
    background.close()
    background.hand_over(ran.clear)
    deadline = time.monotonic() + 10
    while ran.is_set() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not ran.is_set(), "without a loop, in a thread of its own"


def test_it_starts_at_first_use_and_ends_with_its_owner() -> None:
    background = Background()
    before = threading.active_count()
    background.close()
    assert threading.active_count() == before
    background = Background()
    assert background.submit(who()).result(60) == "orla"
    called = threading.Event()
    background.call_later(-1.0, called.set)
    assert called.wait(60)
    background.close()
    background.close()
    assert threading.active_count() == before
    background.call_later(0.0, called.clear)
    late = who()
    with pytest.raises(OrlaClosed):
        background.submit(late)
    assert called.is_set() and inspect.getcoroutinestate(late) == inspect.CORO_CLOSED


def test_it_keeps_nothing_of_the_context_that_first_used_it() -> None:
    class State:
        pass

    variable, background, forever = ContextVar[State]("state"), Background(), asyncio.Event()

    def call() -> weakref.ref[State]:
        state = State()
        variable.set(state)
        background.submit(forever.wait())
        background.call_later(3600.0, forever.set)
        background.submit(who()).result(60)
        return weakref.ref(state)

    held = Context().run(call)
    gc.collect()
    assert held() is None
    background.close()


def test_what_runs_at_the_end_may_clean_up() -> None:
    background, began, cleaned = Background(), threading.Event(), []

    async def works() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            cleaned.append(True)

    future = background.submit(works())
    assert began.wait(60)
    background.close()
    assert cleaned and future.cancelled()


def test_a_thread_that_ended_by_itself_is_replaced_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    background = Background()
    background.submit(who()).result(60)
    loop, thread = background._loop, background._thread
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    assert background.submit(who()).result(60) == "orla" and background._thread is not thread
    assert caplog.text.count("the background thread had ended") == 1
    background.close()


def test_a_loop_that_closed_meanwhile_is_a_closed_orla(monkeypatch: pytest.MonkeyPatch) -> None:
    background = Background()
    background.submit(who()).result(60)
    loop, thread = background._loop, background._thread
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    monkeypatch.setattr(background, "_running_loop", lambda: loop)  # as it was a moment ago
    with pytest.raises(OrlaClosed):
        background.submit(who())
    background.call_later(0.0, print)
    background.close()


def test_closed_by_its_own_thread() -> None:
    background = Background()

    async def ends() -> None:
        background.close()

    thread = background.submit(who()).result(60) and background._thread
    assert background.submit(ends()).result(60) is None
    thread.join(60)
    assert not thread.is_alive()


def test_a_forked_child_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    background = Background()
    background.submit(who()).result(60)
    parents = background._loop, background._thread
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert background.submit(who()).result(60) == "orla"
    assert background._loop is not parents[0]
    background.close()
    parents[0].call_soon_threadsafe(parents[0].stop)
    parents[1].join(60)


def test_errands_are_waited_for_and_those_that_they_begin() -> None:
    background, done = Background(), list[str]()

    async def errand(name: str, *after: str) -> None:
        await asyncio.sleep(0.02)
        done.append(name)
        if after:
            background.errand(errand(*after))

    background.finish_errands(5.0)
    assert done == [], "there were none"
    background.errand(errand("first", "second", "third"))
    background.finish_errands(5.0)
    assert done == ["first", "second", "third"]
    background.close()


def test_an_errand_that_does_not_end_is_not_waited_for_for_ever_nor_on_its_own_thread() -> None:
    background = Background()
    endless = background.errand(asyncio.Event().wait())
    background.finish_errands(0.02)
    asked = threading.Event()
    background.call_later(0.0, lambda: (background.finish_errands(60.0), asked.set()))
    assert asked.wait(60) and not endless.done()
    background._pid -= 1  # as after a fork: they are the parent's
    background.finish_errands(60.0)
    background._pid += 1
    background.close()
    assert endless.cancelled()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_task_that_has_not_begun_when_it_ends_leaves_nothing_unawaited(recwarn: pytest.WarningsRecorder) -> None:
    background = Background()

    async def inner() -> None:
        await asyncio.sleep(60)

    async def wrapping(awaited: Coroutine[Any, Any, None]) -> None:
        await awaited

    async def outer() -> None:
        task = asyncio.get_running_loop().create_task(wrapping(inner()))
        asyncio.get_running_loop().stop()
        await task

    background.submit(outer())
    background.join(10)
    gc.collect()
    assert [str(each.message) for each in recwarn if "never awaited" in str(each.message)] == []
