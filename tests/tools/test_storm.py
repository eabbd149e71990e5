"""Runs that end in every way while tools run that started early: afterwards nothing is left of them.

A part runs with the tests; all of it, 2,000 runs, by ``make test-storm``.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import openai
import pytest
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models import _client_utils
from langgraph._internal._runnable import RunnableCallable
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import interrupt

from orla_lg import Backend, Orla, OrlaError
from orla_lg.graph.tools.early.starts import EarlyStart, EarlyStarts
from orla_lg.graph.tools.early.watch import ToolWatch
from tests.conftest import assert_nothing_left
from tests.test_leaks import alive
from tests.tools.planned_engine import MODEL, Answer, PlannedEngine

WHOLE = os.environ.get("ORLA_ALL_STORMS") == "1"
RUNS = 2_000 if WHOLE else 90
A_STORM = 200 if WHOLE else 45
"""So many runs are served by one Orla; a third of the Orlas is closed while they go on."""

EXPECTED = (openai.OpenAIError, OrlaError, ZeroDivisionError, TimeoutError)
"""What a run may end with."""

CLOSED = "the client has been closed"
"""What httpx says of a request that was about to be sent when its Orla was closed."""

SAFE = ("lookup", "find", "fetch", "fails", "asks", "thinks")
WAYS = ["well"] * 6 + ["cancel"] * 6 + ["failure"] * 3 + ["leave", "drop"] * 3 + ["interrupt"] * 3


@pytest.fixture(autouse=True)
def _no_log_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured log record keeps its exception, and that keeps every frame the call went through."""
    for name in ("concurrent.futures", "asyncio", "orla_lg"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


@dataclass
class Bodies:
    """Every execution of a tool's body."""

    began: Counter[str] = field(default_factory=Counter)
    running: set[int] = field(default_factory=set)
    results: list[weakref.ref[Any]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, key: str) -> int:
        with self.lock:
            number = next(self.numbers)
            self.began[key] += 1
            self.running.add(number)
        return number

    def end(self, number: int) -> None:
        with self.lock:
            self.running.discard(number)

    def result(self, key: str) -> tuple[str, set[str]]:
        artifact = {key}
        with self.lock:
            self.results.append(weakref.ref(artifact))
        return f"found {key}", artifact

    def kept(self) -> int:
        return sum(each() is not None for each in self.results)


def tools_of(bodies: Bodies, llm: ChatOpenAI) -> list[BaseTool]:
    def slowly(key: str, for_ms: int) -> tuple[str, set[str]]:
        """Find something, in its time."""
        number = bodies.begin(key)
        try:
            time.sleep(for_ms / 1000)
            return bodies.result(key)
        finally:
            bodies.end(number)

    async def aslowly(key: str, for_ms: int) -> tuple[str, set[str]]:
        """Find something, in its time."""
        number = bodies.begin(key)
        try:
            await asyncio.sleep(for_ms / 1000)
            return bodies.result(key)
        finally:
            bodies.end(number)

    def fails(key: str, for_ms: int) -> tuple[str, set[str]]:
        """Fail, in its time."""
        slowly(key, for_ms)
        raise ToolException("nothing there")

    def asks(key: str, for_ms: int) -> tuple[str, set[str]]:
        """Ask a human."""
        interrupt("go on?")
        return slowly(key, for_ms)

    def thinks(key: str, for_ms: int) -> tuple[str, set[str]]:
        """Ask a model."""
        number = bodies.begin(key)
        try:
            llm.invoke(f"thought {key}")
            return bodies.result(key)
        finally:
            bodies.end(number)

    made = StructuredTool.from_function
    form: Any = {"response_format": "content_and_artifact"}
    return [
        made(slowly, name="lookup", **form),
        made(slowly, coroutine=aslowly, name="find", **form),
        made(coroutine=aslowly, name="fetch", description="Find something.", **form),
        made(fails, name="fails", handle_tool_error=True, **form),
        made(asks, name="asks", **form),
        made(thinks, name="thinks", **form),
    ]


def plan(body: Any) -> Answer:
    """Answer a question, ``WAY NUMBER async`` or ``… sync``: one or two rounds of calls, at random moments."""
    question = next(message["content"] for message in body["messages"] if message["role"] == "user")
    round_ = sum(bool(message.get("tool_calls")) for message in body["messages"])
    way, seed, kind = (question.split() * 3)[:3]
    dice = random.Random(f"{seed} {round_} {len(body['messages'])}")
    if way == "thought" or round_ > dice.randrange(2):
        time.sleep(dice.random() * 0.01)
        return Answer(text="done")
    names = ["lookup", "lookup", "find", "find", "fails", "thinks", *(["fetch", "fetch"] if kind == "async" else [])]
    if way == "interrupt":
        names += ["asks", "asks"]
    calls = [
        (dice.choice(names), {"key": f"{seed}-{round_}-{at}", "for_ms": dice.choice((0, 1, 5, 20))})
        for at in range(dice.randrange(1, 4))
    ]
    pauses = {at: partial(time.sleep, dice.random() * 0.01) for at in range(len(calls))}
    return Answer(calls=calls, after=pauses, breaks_after=0 if dice.random() < 0.05 else None)


@dataclass(frozen=True)
class Graphs:
    threaded: Any
    single: Any

    def of(self, way: str, seed: int) -> tuple[Any, dict[str, Any]]:
        if way == "interrupt":
            return self.threaded, {"configurable": {"thread_id": f"t{seed}"}}
        return self.single, {"configurable": {}}


def build(llm: ChatOpenAI, tools: list[BaseTool]) -> Any:
    bound = llm.bind_tools(tools)

    async def amodel(state: MessagesState) -> Any:
        return {"messages": [await bound.ainvoke(state["messages"])]}

    def model(state: MessagesState) -> Any:
        return {"messages": [bound.invoke(state["messages"])]}

    def beside(state: MessagesState) -> Any:
        way, seed, _ = state["messages"][0].text.split()
        if way == "failure":
            time.sleep(random.Random(int(seed)).random() * 0.06)
            raise ZeroDivisionError
        return {}

    async def abeside(state: MessagesState) -> Any:
        way, seed, _ = state["messages"][0].text.split()
        if way == "failure":
            await asyncio.sleep(random.Random(int(seed)).random() * 0.06)
            raise ZeroDivisionError
        return {}

    graph = StateGraph(MessagesState)
    graph.add_node("model", RunnableCallable(model, amodel)).add_node("beside", RunnableCallable(beside, abeside))
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "model").add_edge(START, "beside").add_conditional_edges("model", tools_condition)
    return graph.add_edge("tools", "model")


class Outcomes(Counter[str]):
    @contextmanager
    def noting(self) -> Iterator[None]:
        """Count how a run ends; what may not be is raised."""
        name = "ended"
        try:
            yield
        except EXPECTED as error:
            name = type(error).__name__
        except RuntimeError as error:
            if CLOSED not in str(error):
                raise
            name = "OrlaClosed"
        with _lock:
            self[name] += 1


_lock = threading.Lock()


def sync_run(graphs: Graphs, seed: int, outcomes: Outcomes) -> None:
    dice = random.Random(seed)
    way = dice.choice([way for way in WAYS if way != "cancel"])
    question = {"messages": [("user", f"{way} {seed} sync")]}
    graph, config = graphs.of(way, seed)
    with outcomes.noting():
        if way in ("leave", "drop"):
            stream = graph.stream(question, config, stream_mode=dice.choice(["messages", "updates", "values"]))
            for at, _ in enumerate(stream):
                if at == dice.randrange(6):
                    break
            if way == "leave":
                stream.close()
        else:
            graph.invoke(question, config)


async def async_run(graphs: Graphs, seed: int, outcomes: Outcomes) -> None:
    dice = random.Random(seed)
    way = dice.choice(WAYS)
    question = {"messages": [("user", f"{way} {seed} async")]}
    graph, config = graphs.of(way, seed)
    with outcomes.noting():
        if way == "cancel":
            async with asyncio.timeout(dice.random() * 0.15):
                await graph.ainvoke(question, config)
        elif way in ("leave", "drop"):
            stream = graph.astream(question, config, stream_mode=dice.choice(["messages", "updates", "values"]))
            async for _ in stream:
                if dice.random() < 0.3:
                    break
            if way == "leave":
                await stream.aclose()
        else:
            await graph.ainvoke(question, config)


async def many(graphs: Graphs, seeds: range, outcomes: Outcomes) -> None:
    """Run one half of a storm in this loop; no task is left behind."""
    todo = iter(seeds)

    async def worker() -> None:
        for seed in todo:
            await async_run(graphs, seed, outcomes)

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(worker())
    gc.collect()  # dropped generators are closed by the loop once they are collected
    until_s = time.monotonic() + 10
    while len(asyncio.all_tasks()) > 1 and time.monotonic() < until_s:
        await asyncio.sleep(0.002)
    assert not asyncio.all_tasks() - {asyncio.current_task()}


def storm(orla: Orla, llm: ChatOpenAI, bodies: Bodies, seeds: range, outcomes: Outcomes, *, close: bool) -> None:
    """Let runs end in every way, half of them in a loop, half in threads; *close* also ends the Orla under them."""
    graph, errors = build(llm, tools_of(bodies, llm)), list[BaseException]()
    options: Any = {"tools_safe": SAFE, "split_prompts": True}
    graphs = Graphs(
        orla.wrap(graph.compile(checkpointer=InMemorySaver()), **options), orla.wrap(graph.compile(), **options)
    )
    half = seeds.start + len(seeds) // 2

    def looped() -> None:
        try:
            asyncio.run(many(graphs, range(seeds.start, half), outcomes))
        except BaseException as error:
            errors.append(error)
            traceback.print_exception(error)

    thread = threading.Thread(target=looped)
    thread.start()
    with ThreadPoolExecutor(6) as pool:
        runs = [pool.submit(sync_run, graphs, seed, outcomes) for seed in range(half, seeds.stop)]
        if close:
            while outcomes.total() < seeds.start + len(seeds) // 3 and thread.is_alive():
                time.sleep(0.002)
            orla.close()
        for run in runs:
            run.result()
    thread.join()
    assert not errors, errors
    for seed in seeds:
        graphs.threaded.checkpointer.delete_thread(f"t{seed}")


def nothing_left(orla: Orla, bodies: Bodies, timeout_s: float = 5.0) -> None:
    """Assert that of what was started early nothing runs, waits, or is kept, and no prompt is."""
    gc.collect()
    until_s = time.monotonic() + timeout_s

    def figures() -> dict[str, int]:
        told = orla.statistics()
        now = told.early_tools
        return {
            "waiting": now.waiting, "in threads": now.in_threads, "bodies": len(bodies.running),
            "prompts": sum(each.warm_ups.kept_prompts for each in told.backends.values()),
        }  # fmt: skip

    while any(figures().values()) and time.monotonic() < until_s:
        time.sleep(0.005)
    assert not any(figures().values()), figures()
    orla.core.early.check_integrity()
    assert_nothing_left(orla)


def backend(engine: PlannedEngine) -> Backend:
    return Backend("main", engine.url, model=MODEL, assemble=True)


def chat(engine: PlannedEngine) -> ChatOpenAI:
    """Return a model with a client of its own: LangChain's outlives its loop, and calls go there after a close."""
    _client_utils._cached_async_httpx_client.cache_clear()
    return ChatOpenAI(base_url=engine.url, model=MODEL, api_key="none", max_retries=1)


class QuietEngine(PlannedEngine):
    """Clients leave all the time."""

    def __init__(self) -> None:
        super().__init__(plan)
        setattr(self._server, "handle_error", lambda *_: None)  # noqa: B010 - a method, replaced on purpose


@pytest.mark.timeout(900 if WHOLE else 120)
def test_nothing_is_left() -> None:
    threads_before = set(threading.enumerate())
    bodies, outcomes, dropped = Bodies(), Outcomes(), Counter[str]()
    started = used = 0
    with QuietEngine() as engine:
        for number, first in enumerate(range(0, RUNS, A_STORM)):
            with Orla([backend(engine)], {"*": "main"}) as orla:
                storm(orla, chat(engine), bodies, range(first, first + A_STORM), outcomes, close=number % 3 == 1)
                nothing_left(orla, bodies)
                told = orla.statistics().early_tools
                started, used = started + told.started, used + told.used
                dropped.update(told.dropped)
        del orla

    assert outcomes.total() == RUNS
    assert {"ended", "TimeoutError", "ZeroDivisionError"} <= outcomes.keys()
    assert dropped["run_ended"] and used > RUNS / 10 and (dropped["closed"] or not WHOLE)
    assert max(bodies.began.values()) <= 2, "a call's tool ran more than twice"
    for kind in (EarlyStart, ToolWatch):
        assert not alive(kind)
    assert bodies.kept() == 0 and len(bodies.results) > used
    left = {thread for thread in set(threading.enumerate()) - threads_before if not _is_of_the_engine(thread)}
    assert not left
    print(f"\n{RUNS:,} runs: {dict(outcomes)}; {started:,} tools began early, {used:,} were handed over", end="; ")
    print(f"dropped: {dict(dropped)}; {len(bodies.results):,} results, none kept")


def _is_of_the_engine(thread: threading.Thread) -> bool:
    """Whether a thread is of the engine of the test, which has one for each connection."""
    return "process_request_thread" in thread.name


def test_without_the_drop_at_a_runs_end_the_check_finds_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = Bodies()
    monkeypatch.setattr(EarlyStarts, "run_ended", lambda self, run: None)
    with QuietEngine() as engine, Orla([backend(engine)], {"*": "main"}) as orla:
        storm(orla, chat(engine), bodies, range(9_000, 9_030), Outcomes(), close=False)
        with pytest.raises(AssertionError, match=r"'waiting': [1-9]"):
            nothing_left(orla, bodies, timeout_s=0.2)
        monkeypatch.undo()
        for run in list(orla.core.early._runs):
            orla.core.early.run_ended(run)
