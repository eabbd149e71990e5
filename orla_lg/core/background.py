"""The one thread that works unasked: probes, flushes, timers. It has its own loop, and one owner.

What is only to be called later refers to its owner weakly, and carries nothing of the context in which it was asked
for: else a thread that waits for a timer would keep alive a core, and a graph, that are used by nothing else.
"""

from __future__ import annotations

import _thread
import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import logging
import os
import threading
import time
import types
import weakref
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from typing import Any, TypeVar

from orla_lg.errors import OrlaClosed

log = logging.getLogger("orla_lg")

T = TypeVar("T")

ENDING_PATIENCE_S = 2.0
"""How long what is done last, when nothing waits for it, may take."""

CLEANUP_S = 1.0
"""How long cancelled work may take to clean up."""


Clock = Callable[[], float]


_collecting = 0
"""The thread in which the cyclic collector runs now; 0 for none."""


def _note_collection(phase: str, info: dict[str, int]) -> None:
    global _collecting
    _collecting = threading.get_ident() if phase == "start" else 0


gc.callbacks.append(_note_collection)


def is_collecting() -> bool:
    """Whether this thread is inside the cyclic collector, which runs destructors and ends generators.

    It may have begun at any allocation, under any lock that this thread holds: what such code does must take none.
    """
    return _collecting == threading.get_ident()


class Background:
    """A thread with an event loop, started at first use, and anew after a fork or if it ended by itself.

    On the request path only a backend's first probe, a slot's swap and what a mapper asks are waited for. Work runs
    in a context of its own: it outlives the call that began it, whose context holds a graph's whole state.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._closed = False
        self._errands = set[concurrent.futures.Future[Any]]()
        self._ending: asyncio.Task[None] | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the loop; the future carries its result or error.

        Raises:
            OrlaClosed: ``close`` was called.
        """
        try:
            return Context().run(asyncio.run_coroutine_threadsafe, work, self._running_loop())
        except RuntimeError as error:  # ``OrlaClosed``, or the loop closed since
            work.close()
            raise OrlaClosed("this Orla is closed; make a new one to go on") from error

    def errand(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """``submit`` what should not be cut off at the end: ``finish_errands`` waits for it.

        Raises:
            OrlaClosed: ``close`` was called.
        """
        errand = self.submit(work)
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)
        return errand

    def finish_errands(self, timeout_s: float) -> None:
        """Wait until no errand is under way, those included that others begin; at most *timeout_s* seconds."""
        if self._pid != os.getpid() or threading.current_thread() is self._thread:
            return  # the parent's, or nobody would be left to do them
        until_s = time.monotonic() + timeout_s
        while under_way := [errand for errand in self._errands.copy() if not errand.done()]:
            if (left_s := until_s - time.monotonic()) <= 0:
                return
            concurrent.futures.wait(under_way, timeout=left_s)

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call *function* on the loop's thread after *delay_s* seconds; nothing happens when closed.

        Nor if it is a method, or a ``partial`` of one, of an object that is gone by then.
        """
        with contextlib.suppress(RuntimeError):
            loop = self._running_loop()
            later = functools.partial(loop.call_later, max(0.0, delay_s), _weakly(function), context=Context())
            loop.call_soon_threadsafe(later, context=Context())

    def hand_over(self, function: Callable[[], None]) -> None:
        """Have *function* called soon in another thread: for what the collector runs (``is_collecting``).

        This takes no lock and waits for nothing. Without a running loop *function* gets a thread of its own.
        """
        loop = self._loop
        if loop is not None and self._pid == os.getpid() and not self._closed:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(function, context=Context())
                return
        _thread.start_new_thread(function, ())  # ``threading`` would take a lock that this thread may hold

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise OrlaClosed("this Orla is closed; make a new one to go on")
            forked = self._pid != os.getpid()
            if self._thread is not None and not forked and not self._thread.is_alive():
                log.error("the background thread had ended; what it was doing was cancelled, and another one goes on")
                self._loop = None
            if self._loop is None or forked:
                self._start()
            assert self._loop is not None
            return self._loop

    def _start(self) -> None:
        self._loop, self._pid = Context().run(asyncio.new_event_loop), os.getpid()
        self._errands.clear()
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="orla", daemon=True)
        self._thread.start()

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:  # also when a coroutine raised ``SystemExit``, which ends its loop
            # Tasks made a moment ago start first: cancelled before, they leave what they were to await unawaited.
            loop.run_until_complete(asyncio.sleep(0))
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=CLEANUP_S))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def end(self, last: Sequence[Callable[[], Coroutine[Any, Any, None]]], then: Callable[[], None]) -> bool:
        """Have the thread do *last*, for a bounded time, *then* what is left, and end.

        Returns whether there is a thread that will; waits for nothing and takes no lock.
        """
        self._closed = True
        loop = self._loop
        if loop is None or self._pid != os.getpid():
            return False

        async def do_last() -> None:
            try:
                works = [loop.create_task(work()) for work in last]
                if works:
                    await asyncio.wait(works, timeout=ENDING_PATIENCE_S)
                for work in works:
                    if work.done() and not work.cancelled() and (error := work.exception()) is not None:
                        log.debug("the background thread ends with an error", exc_info=error)
                then()
            finally:
                loop.stop()

        def begin() -> None:
            self._ending = loop.create_task(do_last())

        try:
            loop.call_soon_threadsafe(begin, context=Context())
        except RuntimeError:  # the loop is closed
            return False
        return True

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread, at most *timeout_s* seconds."""
        thread = self._thread
        if thread is not None and self._pid == os.getpid() and thread is not threading.current_thread():
            thread.join(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """End the loop and its thread; waits up to *timeout_s* seconds. Idempotent."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None or self._pid != os.getpid():
            return
        with contextlib.suppress(RuntimeError):  # it ended by itself
            loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(timeout_s)


def _weakly(function: Callable[..., None]) -> Callable[[], None]:
    """Return what calls *function* if the object whose method it is still exists; others are returned as they are."""
    bound, arguments = (function.func, function.args) if isinstance(function, functools.partial) else (function, ())
    if not isinstance(bound, types.MethodType) or getattr(function, "keywords", None):
        return function
    try:
        reference = weakref.WeakMethod(bound)
    except TypeError:  # its class allows no weak references
        return function

    def call() -> None:
        if (method := reference()) is not None:
            method(*arguments)

    return call
