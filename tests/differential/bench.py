"""What the examples of one session share, and how one of them is examined."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from openai import _base_client

from orla_lg import Backend, ChatOrla, Orla
from orla_lg.core.engine import registry
from orla_lg.core.engine.retry import RetryPolicy
from orla_lg.graph import interception
from orla_lg.graph.tools.early.watch import watch_for
from orla_lg.wires.watching import AnswerWatch, HeardToolCall, Late
from tests.conftest import BACKEND_KEY, CALLER_KEY, assert_nothing_left
from tests.differential.judging import worse
from tests.differential.runs import SAFE, Answered, Failed, Job, Run, arun, bare_model, birthplace, make_graph, run
from tests.differential.script import Case
from tests.differential.server import MODEL, ScriptedServer

PATIENCE_S = 30.0
COLLECTIONS = 4
PAUSE_S = 0.004
"""Between attempts, the SDK's and ours: examples are many."""


@dataclass(frozen=True)
class Verification:
    """What came of one case."""

    bare: Run
    wrapped: Run
    watched: Run
    orla: Run
    faults: tuple[str, ...]
    """In what it is worse than bare, and what it left behind."""


class Listening:
    """Hears an answer, and lets what starts tools hear it too.

    Args:
        inner: What starts tools; ``None`` where no safe one is offered.
    """

    wants_calls = wants_message = True

    def __init__(self, inner: AnswerWatch | None) -> None:
        self._inner = inner
        self._attempts: list[tuple[list[HeardToolCall], list[Any]]] = []
        """Of each what was heard, and its ends."""

    def comes_late(self, why: Late) -> None:
        if self._inner is not None:
            self._inner.comes_late(why)

    def begins(self) -> None:
        self._attempts.append(([], []))
        if self._inner is not None:
            self._inner.begins()

    def tool_call(self, call: HeardToolCall) -> None:
        self._attempts[-1][0].append(call)
        if self._inner is not None:
            self._inner.tool_call(call)

    def ends(self, message: Any) -> None:
        self._attempts[-1][1].append(message)
        if self._inner is not None:
            self._inner.ends(message)

    def faults(self) -> list[str]:
        """Return what should not have been heard."""
        found = []
        for heard, ends in self._attempts:
            if len(ends) != 1:
                found.append(f"an attempt with {len(ends)} ends")
            elif ends[0] is not None:
                called = {call["function"]["name"] for call in ends[0].get("tool_calls") or ()}
                if phantoms := {call.name for call in heard} - called:
                    found.append(f"calls were heard that are none: {phantoms}")
        return found


LISTENING: list[Listening] = []
"""Over the calls of the case that is examined."""


def listening(core: Any, come_from: Any, inflight: Any, body: Any) -> Listening:
    """Stand in for ``watch_for``, and let it start tools."""
    LISTENING.append(Listening(watch_for(core, come_from, inflight, body)))
    return LISTENING[-1]


def drained(watches: list[Listening]) -> list[Listening]:
    """Return what is in the list, and empty it."""
    found, watches[:] = watches[:], []
    return found


class Bench:
    """The server, the graph and a running loop; ``examine`` makes all calls of a case."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.graph, self.tool_graph = make_graph(), make_graph(with_tools=True)
        self._numbers = itertools.count(1)
        self._unheard: list[str] = []
        """Raw exceptions of ours that a task or a callback of the loop ended in and nothing retrieved."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._hear)
        self._thread = threading.Thread(target=self._loop.run_forever, name="examples", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the loop, and the threads that looked up addresses for it."""
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _hear(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # LangChain's own, bare as well: branches of a stream that is dropped close it at the same time.
        if (error := context.get("exception")) is not None and (place := birthplace(error)):
            self._unheard.append(f"unheard in the loop: {error!r} from {place}")

    def examine(self, case: Case) -> Verification:
        """Make the case's call in every way, and judge.

        What comes by chance is looked at twice: a busy machine holds a call up, and bare meets a kept connection
        that the server is just closing.
        """
        found = self._examine(case)
        bare, slow = found.bare.outcome, all(": took " in fault for fault in found.faults)
        by_chance = slow or case.retries or (isinstance(bare, Failed) and bare.kind == "connection")
        return self._examine(case) if found.faults and by_chance else found

    def _examine(self, case: Case) -> Verification:
        number = next(self._numbers)
        keys = {way: f"case-{number}-{way}" for way in ("bare", "wrapped", "watched", "orla")}
        for key in keys.values():
            self.server.scripts[key] = case.script
        model = bare_model(self.server.url, CALLER_KEY, case.retries, case.stream_usage)
        try:
            bare = self._run(self.graph, Job(case, keys["bare"], model))
            backend = Backend("main", self.server.url, model=MODEL, api_key=BACKEND_KEY)
            with Orla([backend], mapper={"*": "main"}, control=False) as orla:
                orla.core.serving.services.retries = RetryPolicy(base_s=PAUSE_S)
                wrapped = self._run(orla.wrap(self.graph), Job(case, keys["wrapped"], model))
                faults = self._left(orla, case, wrapped, keys["wrapped"])
            streaming = Backend("main", self.server.url, model=MODEL, api_key=BACKEND_KEY, assemble=True)
            with Orla([streaming], mapper={"*": "main"}, control=False) as orla:
                orla.core.serving.services.retries = RetryPolicy(base_s=PAUSE_S)
                graph = orla.wrap(self.tool_graph, tools_safe=set(SAFE))
                watched = self._run(graph, Job(case, keys["watched"], model))
                faults += self._left(orla, case, watched, keys["watched"])
                watches = drained(LISTENING)
                self._comes_true(lambda: not any(watch.faults() for watch in watches))
                faults += [f"watched: {fault}" for watch in watches for fault in watch.faults()]
            with Orla([backend], mapper={"*": "main"}, control=False) as orla:
                orla.core.serving.services.retries = RetryPolicy(base_s=PAUSE_S)
                asks = {"stream_usage": True} if case.stream_usage else {}
                chat = ChatOrla(orla=orla, max_retries=case.retries, timeout=model.request_timeout, **asks)
                through = self._run(self.graph, Job(case, keys["orla"], chat))
                faults += self._left(orla, case, through, keys["orla"])
            served = {keys["wrapped"], keys["watched"], keys["orla"]}
            if not self._comes_true(lambda: not self.server.connected(served)):
                faults.append("connections are open after close()")

            def bare_of(another: Case) -> Run:
                key = f"case-{next(self._numbers)}-bare"
                keys[key], self.server.scripts[key] = key, another.script
                return self._run(self.graph, Job(another, key, model))

            for way, other in (("wrapped", wrapped), ("watched", watched), ("orla", through)):
                assembles = way == "orla" or (way == "watched" and not case.streams)
                found = worse(case, bare, other, assembles=assembles, bare_of=bare_of)
                if found is not None:
                    faults.append(f"{way}: {found}")
                faults += [f"{way}: {fault}" for fault in self._disclosed(keys[way])]
            unheard, self._unheard = self._unheard, []
            return Verification(bare, wrapped, watched, through, (*faults, *unheard))
        finally:
            self.server.forget(set(keys.values()))

    def _run(self, graph: Any, job: Job) -> Run:
        if job.case.outer in ("invoke", "stream"):
            done = run(graph, job)
        else:
            done = asyncio.run_coroutine_threadsafe(arun(graph, job), self._loop).result(PATIENCE_S)
        return replace(done, requests=len(self.server.seen.get(job.key, ())))

    def _left(self, orla: Orla, case: Case, done: Run, key: str) -> list[str]:
        """Return what the call left behind, and what is wrong with its record."""
        faults = []
        if not self._settled(orla, key):
            faults.append(f"in flight after the end: {orla.statistics().backends['main'].queue}")
        try:
            assert_nothing_left(orla)
        except AssertionError as error:
            faults.append(f"left behind: {error}")
        records = orla.records()
        if len(records) != 1:
            faults.append(f"{len(records)} records of one call")
        elif isinstance(done.outcome, Answered) and case.inner != "stop" and records[0].error is not None:
            faults.append(f"answered, and its record says {records[0].error}")
        return faults

    def _settled(self, orla: Orla, key: str) -> bool:
        def idle() -> bool:
            queue = orla.statistics().backends["main"].queue
            return not (queue.in_flight or queue.waiting or self.server.busy({key}))

        return self._comes_true(idle)

    def _comes_true(self, condition: Callable[[], bool]) -> bool:
        """Wait until *condition* holds, if need be without what nothing refers to; returns whether it does.

        What hangs in a cycle of an exception's frames ends when that is collected, bare as well. One collection is
        not enough: it does nothing while another thread is in the middle of one.
        """
        for _ in range(COLLECTIONS):
            if self.server.wait(condition, 0.3):
                return True
            gc.collect()
        return self.server.wait(condition)

    def _disclosed(self, key: str) -> list[str]:
        """Return what went where it must not: a key, or a prompt, to another host than the backend's own."""
        home = f"127.0.0.1:{self.server.port}"
        faults = []
        for seen in self.server.seen.get(key, ()):
            if CALLER_KEY in seen.authorization:
                faults.append("the caller's key went to the backend")
            if seen.host != home and BACKEND_KEY in seen.authorization:
                faults.append(f"the backend's key went to {seen.host}")
            if seen.host != home and seen.body:
                faults.append(f"the prompt went to {seen.host}")
        return faults


@contextmanager
def running_bench() -> Iterator[Bench]:
    """Run what the examples share, with short pauses, and without looking for entry points each time."""
    entry_points = functools.cache(registry.entry_points)
    with (
        mock.patch.object(_base_client, "INITIAL_RETRY_DELAY", PAUSE_S),
        mock.patch.object(registry, "entry_points", entry_points),
        mock.patch.object(interception, "watch_for", listening),
        ScriptedServer() as server,
    ):
        bench = Bench(server)
        try:
            yield bench
        finally:
            bench.close()
