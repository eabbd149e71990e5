"""The tools that were started early, by root run: begun, handed over once, or dropped.

A start that is neither handed over nor dropped *waits*. Invariants, under the lock: a start waits in the list of one
run or in none; of those of a run there are ``MOST_OF_A_RUN`` at most, of all ``MOST``; ``_in_threads`` counts bodies
that a thread runs or is about to, waiting or not, and is ``THREADS`` at most. A thread's body that was dropped runs
to its end, since no thread can be stopped, and keeps its thread until then.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any

from langchain_core.tools import BaseTool

from orla_lg.core.background import Background
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.operation.statistics import EarlyToolStatistics
from orla_lg.graph.running_node import RunningNode
from orla_lg.graph.tools.declared import SafeTools
from orla_lg.graph.tools.early.arguments import Arguments, are_equal
from orla_lg.graph.tools.early.reasons import DropReason, LeftOut
from orla_lg.wires.watching import Late

THREADS = 32
"""Bodies that run in threads at once, of one ``Orla``; a start that finds no thread is not made."""

MOST_OF_A_RUN = 64
"""Starts of one run that wait at once; with a further one the oldest is dropped."""

MOST = 1_000
"""Starts of all runs that wait at once; a further one is not made."""

KEEP_S = 300.0
"""A start that was not handed over for so long is dropped, at the latest after twice that."""


@dataclass(frozen=True, slots=True)
class AskingCall:
    """The model call in whose answer a tool call was."""

    call: str
    """Its record's id."""
    run: str
    """The root run."""
    stage: str
    namespace: str
    """Of this execution of its node, with ids."""
    step: int | None


def around_of(namespace: str) -> str:
    """Return the namespace of the graph execution that a node's execution is in."""
    return namespace.rpartition(NAMESPACE_SEPARATOR)[0]


class EarlyStart:
    """One tool that was started before its turn.

    Args:
        asking: What asked for it.
        tool: The tool.
        arguments: Validated, apart from those that the body has.
        said: The arguments as the model wrote them, parsed.
        stage: Of the tool's own node.
        tools: What learns how it ends.
    """

    __slots__ = (
        "arguments", "asking", "began_s", "ended_s", "is_answered", "is_certain", "loop", "made_s", "needs_its_place",
        "node", "outcome", "said", "stage", "task", "tool", "tools",
    )  # fmt: skip

    def __init__(
        self, asking: AskingCall, tool: BaseTool, arguments: Arguments, said: Mapping[str, Any], stage: str,
        tools: SafeTools | None = None,
    ) -> None:  # fmt: skip
        self.asking = asking
        self.tool = tool
        self.arguments = arguments
        self.said = said
        self.stage = stage
        self.tools = tools
        self.outcome: Future[Any] = Future()
        """What the body returned or raised; cancelled where it never began, or was cancelled."""
        self.task: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        """The task's."""
        self.made_s = self.began_s = self.ended_s = 0.0
        """Monotonic seconds; 0 while that has not happened."""
        self.node: RunningNode | None = None
        """What stands for the tool's node, once the body runs."""
        self.needs_its_place = False
        """The body asked for what is there in its place only."""
        self.is_answered = False
        """The answer has ended in which its call was."""
        self.is_certain = False
        """The whole answer asks for its call."""

    @property
    def ran_s(self) -> float:
        """For how many seconds the body runs or ran; 0 before it began."""
        return (self.ended_s or time.monotonic()) - self.began_s if self.began_s else 0.0

    @property
    def came_to_nothing(self) -> bool:
        """Whether the body was kept from beginning, was cancelled or raised, so that the tool runs in its place."""
        outcome = self.outcome
        return outcome.cancelled() or (outcome.done() and outcome.exception() is not None)

    def run(self, body: Callable[[], Any]) -> None:
        """Run a body in this thread."""
        if not self.outcome.set_running_or_notify_cancel():
            return
        self.began_s = time.monotonic()
        try:
            result = body()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the tool meets it again in its place
            self._end(error=error)
        else:
            self._end(result)

    async def arun(self, body: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Run a body in this task."""
        if not self.outcome.set_running_or_notify_cancel():
            return
        self.began_s = time.monotonic()
        try:
            result = await body()
        except asyncio.CancelledError as error:
            self._end(error=error)
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, the tool meets it again in its place
            self._end(error=error)
        else:
            self._end(result)

    def _end(self, result: Any = None, error: BaseException | None = None) -> None:
        self.ended_s = time.monotonic()
        if self.node is not None:
            self.node.over = True
        if error is None:
            self.outcome.set_result(result)
        else:  # without its traceback: that would keep frames, and what is in them, until the start is dropped
            self.outcome.set_exception(error.with_traceback(None))

    def cancel(self) -> None:
        """Keep the body from beginning, or cancel it if it is a task; from any thread."""
        self.outcome.cancel()
        task, loop = self.task, self.loop
        if task is None or loop is None or loop.is_closed():
            return
        if asyncio._get_running_loop() is loop:
            task.cancel()
        else:
            try:
                loop.call_soon_threadsafe(task.cancel, context=Context())
            except RuntimeError:  # the loop closed since, and its tasks with it
                return


class EarlyStarts:
    """All early starts of one ``Orla``. Any thread may call, the collector too."""

    def __init__(self) -> None:
        self.hears: Callable[[EarlyStart, str], None] | None = None
        """Called for each start whose result no call got, and why; by the collector too."""
        self._begin()
        self._closed = False

    def _begin(self) -> None:
        self._lock = threading.RLock()
        """Reentrant, because the collector may end a dropped run at any point of what is done under it."""
        self._pid = os.getpid()
        self._runs: dict[str, list[EarlyStart]] = {}
        self._waiting = 0
        self._pool: ThreadPoolExecutor | None = None
        self._in_threads = 0
        self._is_timed = False
        self._started = self._used = self._failed = self._twice = self._no_room = 0
        self._hidden_s = 0.0
        self._offered = 0
        self._dropped, self._left_out, self._late = Counter[str](), Counter[str](), Counter[str]()

    def _in_vain(self, starts: Iterable[EarlyStart], why: str) -> None:
        if self.hears is not None:
            for start in starts:
                self.hears(start, why)

    @property
    def is_idle(self) -> bool:
        """Whether no start waits."""
        return not self._waiting or self._pid != os.getpid()

    def of_run(self, run: str) -> list[EarlyStart]:
        """Return the starts of a root run that wait."""
        return [] if self.is_idle else list(self._runs.get(run, ()))

    # Begin

    def offered(self) -> None:
        """Count a call that offers a safe tool."""
        with self._lock:
            self._offered += 1

    def comes_late(self, why: Late) -> None:
        """Count an attempt of such a call whose answer brings its tool calls at the end only."""
        with self._lock:
            self._late[str(why)] += 1

    def begin(
        self, start: EarlyStart, body: Callable[[], Any], context: Context, loop: asyncio.AbstractEventLoop | None,
        background: Background,
    ) -> bool:  # fmt: skip
        """Start a body in *context*, as a task of *loop*, the running one, or in a thread; returns whether it is."""
        if self._pid != os.getpid():  # what was started is the parent's
            self._begin()
        run, oldest = start.asking.run, None
        with self._lock:
            if self._closed or self._waiting >= MOST or (loop is None and self._in_threads >= THREADS):
                self._no_room += not self._closed
                return False
            starts = self._runs.setdefault(run, [])
            if len(starts) >= MOST_OF_A_RUN:
                oldest = starts[0]
            starts.append(start)
            self._waiting += 1
            self._started += 1
            self._in_threads += loop is None
            pool = self._pool
            if pool is None and loop is None:
                pool = self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="orla-early")
            timed, self._is_timed = self._is_timed, True
        if oldest is not None:
            self.drop([oldest], DropReason.TOO_MANY)
        if not timed:
            background.call_later(KEEP_S, partial(self.expire, background))
        start.made_s = time.monotonic()
        try:
            if loop is not None:
                start.loop = loop
                start.task = loop.create_task(start.arun(body), context=context)
            else:
                assert pool is not None
                pool.submit(context.run, start.run, body).add_done_callback(self._left_thread)
        except RuntimeError:  # the interpreter ends, or there can be no further thread
            self._take_out([start])
            start.cancel()
            with self._lock:
                self._in_threads -= loop is None
                self._started -= 1
            return False
        return True

    def _left_thread(self, _: Future[None]) -> None:
        with self._lock:
            self._in_threads -= 1

    # End

    def take(self, run: str, tool: BaseTool, arguments: Arguments, namespace: str = "") -> EarlyStart | None:
        """Return the start of a call whose turn came, for this caller only; ``None`` where there is none.

        Args:
            run: The root run.
            tool: The tool.
            arguments: Validated.
            namespace: Of the node that runs the tool. Of equal calls its own graph's goes first: branches may make
                the same ones, and what a branch leaves is dropped at its next call.
        """
        if self.is_idle:
            return None
        equal = [
            start for start in list(self._runs.get(run, ()))
            if start.tool is tool and are_equal(start.arguments, arguments)
        ]  # fmt: skip
        if len(equal) > 1:
            around = around_of(namespace)
            equal.sort(key=lambda start: around_of(start.asking.namespace) != around)
        taken = next((start for start in equal if self._take_out([start])), None)
        if taken is not None and taken.tools is not None:
            taken.tools.asked(tool)
        return taken

    def handed_over(self, start: EarlyStart, hidden_s: float) -> None:
        """Count a start whose result its call got, and how much of its time passed before its turn."""
        with self._lock:
            self._used += 1
            self._hidden_s += hidden_s

    def ran_again(self, start: EarlyStart) -> None:
        """Count a start whose call runs the tool in its place."""
        with self._lock:
            if start.began_s:
                self._failed += 1
                self._twice += 1
            else:
                self._dropped[DropReason.NOT_BEGUN.value] += 1
        self._in_vain([start], "failed" if start.began_s else DropReason.NOT_BEGUN)

    def left_waiting(self, start: EarlyStart) -> None:
        """Count a start whose call was cancelled while it waited for the result."""
        with self._lock:
            self._dropped[DropReason.CANCELLED.value] += 1
        self._in_vain([start], DropReason.CANCELLED)

    def drop(self, starts: Iterable[EarlyStart], why: DropReason, *, is_unused: bool = False) -> None:
        """Drop those of *starts* that wait, and cancel what can be cancelled.

        Args:
            starts: Some.
            why: For the count.
            is_unused: Their turns passed and no call asked for them, which is learned of their tools.
        """
        dropped = self._take_out(starts)
        for start in dropped:
            start.cancel()
        if dropped:
            with self._lock:
                self._dropped[str(why)] += len(dropped)
            self._in_vain(dropped, why)
        if is_unused:
            self._learn([start for start in dropped if start.is_certain])

    def _learn(self, unused: list[EarlyStart]) -> None:
        """Learn of the tools of starts that no call asked for."""
        for tools, tool in {(start.tools, id(start.tool)) for start in unused if start.tools is not None}:
            of_tool = [start for start in unused if start.tools is tools and id(start.tool) == tool]
            if tools.unused(of_tool[0].tool, [start.asking.call for start in of_tool], of_tool[0].stage):
                self.left_out(LeftOut.UNUSED)

    def left_out(self, why: LeftOut) -> None:
        """Count a tool that is not started early any more."""
        with self._lock:
            self._left_out[str(why)] += 1

    def run_ended(self, run: str, *, is_done: bool = False) -> None:
        """Drop what was started for a root run, and cancel what can be cancelled.

        Args:
            run: Its id.
            is_done: It came to its end: it was not cancelled or interrupted, and did not fail.
        """
        if not self.is_idle and (starts := self._runs.get(run)) is not None:
            self.drop(starts, DropReason.RUN_ENDED, is_unused=is_done)

    def expire(self, background: Background) -> None:
        """Drop what waits for too long, and look again later."""
        until_s = time.monotonic() - KEEP_S
        self.drop([each for each in self._all() if each.made_s < until_s], DropReason.TOO_LONG)
        with self._lock:
            self._is_timed = bool(self._waiting) and not self._closed
            again = self._is_timed
        if again:
            background.call_later(KEEP_S, partial(self.expire, background))

    def _all(self) -> list[EarlyStart]:
        with self._lock:
            return [start for starts in self._runs.values() for start in starts]

    def _take_out(self, starts: Iterable[EarlyStart]) -> list[EarlyStart]:
        """Take those of *starts* out that wait, and return them."""
        found = []
        with self._lock:
            for start in list(starts):
                waiting = self._runs.get(start.asking.run)
                if waiting is not None and start in waiting:
                    waiting.remove(start)
                    found.append(start)
                    self._waiting -= 1
                    if not waiting:
                        del self._runs[start.asking.run]
        return found

    # Seen and closed

    def statistics(self) -> EarlyToolStatistics:
        """Return a snapshot."""
        with self._lock:
            return EarlyToolStatistics(
                started=self._started, used=self._used, hidden_s=self._hidden_s, dropped=dict(self._dropped),
                failed=self._failed, ran_twice=self._twice, no_room=self._no_room, waiting=self._waiting,
                in_threads=self._in_threads, left_out=dict(self._left_out),
                offered=self._offered, late=dict(self._late),
            )  # fmt: skip

    def check_integrity(self) -> None:
        """Assert the invariants."""
        with self._lock:
            assert self._waiting == sum(map(len, self._runs.values())) <= MOST
            assert all(0 < len(starts) <= MOST_OF_A_RUN for starts in self._runs.values())
            assert 0 <= self._in_threads <= THREADS

    def close(self) -> None:
        """Drop all, start nothing more, and let the threads end with what they run. Idempotent."""
        self._closed = True
        if self._pid != os.getpid():
            return
        self.drop(self._all(), DropReason.CLOSED)
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
