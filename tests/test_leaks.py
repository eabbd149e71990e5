"""After a thousand runs that end in every way, nothing is left: no grant, slot, thread, task, run or entry."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import openai
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph._internal._runnable import RunnableCallable
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import interrupt

from orla_lg import Backend, Orla, OrlaError
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.workflow import RunState
from orla_lg.graph.execution import handlers_of
from tests.conftest import assert_nothing_left, at, chat
from tests.stub_engine import MODEL, Reply, Seen, StubEngine

RUNS = 1_000
THREADS = 40
EXPECTED = (json.JSONDecodeError, openai.OpenAIError, OrlaError, ZeroDivisionError)


@pytest.fixture(autouse=True)
def _no_log_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured log record keeps its exception, and that keeps every frame the call went through."""
    for name in ("concurrent.futures", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


@pytest.fixture
def slotted() -> Iterator[StubEngine]:
    """A stub that looks like llama.cpp with four slots."""
    with StubEngine(slots=4) as running:
        yield running


def with_slots(engine: StubEngine) -> Backend:
    return at(engine, "slots", engine="llamacpp")


def unsteady(seed: int) -> Callable[[Seen], Reply | None]:
    """Return a rule: most answers are quick, some slow, some fail in one way or another."""
    dice, lock = random.Random(seed), threading.Lock()
    faults = [
        Reply(status=500),
        Reply(status=429, headers=(("retry-after", "0.001"),)),
        Reply(fault="reset"),
        Reply(fault="reset"),
        Reply(fault="cut"),
        Reply(fault="garbage"),
    ]

    def rule(seen: Seen) -> Reply | None:
        with lock:
            if dice.random() < 0.12:
                return dice.choice(faults)
            return Reply(before_s=dice.random() * 0.01) if dice.random() < 0.2 else None

    return rule


def build(engine: StubEngine) -> Any:
    """Two stages on two backends; what a run is to meet stands in its configuration."""
    llm = chat(engine, max_retries=1)

    async def adraft(state: MessagesState) -> Any:
        return {"messages": [await llm.ainvoke(state["messages"][-3:])]}

    def draft(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"][-3:])]}

    def review(state: MessagesState, config: RunnableConfig) -> Any:
        meets = config["configurable"].get("meets")
        if meets == "interrupt":
            interrupt("go on?")
        if meets == "failure":
            raise ZeroDivisionError
        pieces = []
        for piece in llm.stream(state["messages"][-3:]):
            pieces.append(piece)
            if meets == "half" and len(pieces) == 2:
                break
        return {"messages": [sum(pieces[1:], pieces[0])]}

    graph = StateGraph(MessagesState).add_node("draft", RunnableCallable(draft, adraft)).add_node("review", review)
    graph.add_edge(START, "draft").add_edge("draft", "review")
    return graph


@dataclass(frozen=True)
class Graphs:
    """The same graph, with a checkpointer and without."""

    threaded: Any
    single: Any

    def choose(self, dice: random.Random, way: str) -> tuple[Any, RunnableConfig]:
        """Return the graph for one run and its configuration."""
        config: dict[str, Any] = {"meets": way}
        if dice.random() < 0.1:
            config["orla"] = {"deadline_s": 0.001}
        if way != "interrupt" and dice.random() < 0.6:
            return self.single, {"configurable": config}
        return self.threaded, {"configurable": {**config, "thread_id": f"t{dice.randrange(THREADS)}"}}


class Outcomes(Counter[str]):
    """Counts how runs ended; what nobody expects is raised."""

    def run(self, body: Callable[[], Any]) -> None:
        try:
            body()
        except EXPECTED as error:
            self[type(error).__name__] += 1
        else:
            self["ended"] += 1

    async def arun(self, body: Any) -> None:
        try:
            await body
        except EXPECTED as error:
            self[type(error).__name__] += 1
        except TimeoutError:
            self["cancelled"] += 1
        else:
            self["ended"] += 1


WAYS = ["well"] * 12 + ["interrupt", "failure", "half", "leave", "drop", "cancel"]


def sync_run(graphs: Graphs, seed: int) -> None:
    dice = random.Random(seed)
    way = dice.choice(WAYS)
    graph, config = graphs.choose(dice, way)
    if way in ("leave", "drop", "cancel"):
        stream = graph.stream({"messages": [("user", f"number {seed}")]}, config, stream_mode="messages")
        for count, _ in enumerate(stream):
            if count == dice.randrange(6):
                break
        if way == "leave":
            stream.close()
    else:
        graph.invoke({"messages": [("user", f"number {seed}")]}, config)


async def async_run(graphs: Graphs, seed: int) -> None:
    dice = random.Random(seed)
    way = dice.choice(WAYS)
    question = {"messages": [("user", f"number {seed}")]}
    graph, config = graphs.choose(dice, way)
    if way == "cancel":
        async with asyncio.timeout(dice.random() * 0.08):
            await graph.ainvoke(question, config)
    elif way in ("leave", "drop"):
        stream = graph.astream(question, config, stream_mode="messages")
        async for _ in stream:
            if dice.random() < 0.3:
                break
        if way == "leave":
            await stream.aclose()
    else:
        await graph.ainvoke(question, config)


async def many(graphs: Graphs, seeds: range, outcomes: Outcomes) -> None:
    todo = iter(seeds)

    async def worker() -> None:
        for seed in todo:
            await outcomes.arun(async_run(graphs, seed))

    async with asyncio.TaskGroup() as group:
        for _ in range(24):
            group.create_task(worker())
    gc.collect()  # dropped generators are closed by the loop once they are collected
    for _ in range(100):
        if len(asyncio.all_tasks()) == 1:
            break
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
    assert len(asyncio.all_tasks()) == 1


async def _others_done() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others)


def settled(orla: Orla) -> None:
    """Wait until the background loop has nothing left to do."""
    orla.core.serving.background.submit(_others_done()).result(20)


def alive(kind: type) -> list[Any]:
    """Return the objects of a type that are left after a thorough collection."""
    for _ in range(3):
        gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, kind)]


def test_nothing_is_left(engine: StubEngine, slotted: StubEngine, make_orla: Any) -> None:
    threads_before = set(threading.enumerate())
    engine.rule, slotted.rule = unsteady(1), unsteady(2)
    orla = make_orla(
        at(engine, "plain", max_concurrency=8), with_slots(slotted), mapper={"draft": "plain", "review": "slots"}
    )
    graph = build(engine)
    graphs = Graphs(orla.wrap(graph.compile(checkpointer=InMemorySaver())), orla.wrap(graph.compile()))
    outcomes, async_outcomes = Outcomes(), Outcomes()
    asynchronous = threading.Thread(target=lambda: asyncio.run(many(graphs, range(RUNS // 2), async_outcomes)))
    asynchronous.start()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda seed: outcomes.run(lambda: sync_run(graphs, seed)), range(RUNS // 2, RUNS)))
    asynchronous.join()

    both = outcomes + async_outcomes
    assert both.total() == RUNS
    assert {"cancelled", "ZeroDivisionError", "BackendUnavailable", "DeadlineExceeded"} <= both.keys()
    assert any(record.attempts > 1 and record.error is None for record in orla.records()), "garbage is tried again"
    assert set(map(str, orla.statistics().workflows.outcomes)) == {
        "done", "interrupted", "failed", "cancelled", "abandoned",
    }  # fmt: skip

    gc.collect()
    settled(orla)
    assert_nothing_left(orla)
    assert orla.statistics().workflows.idle <= THREADS
    for scheduler in orla.core.serving.schedulers.values():
        assert not scheduler.queue.stages and not scheduler.queue.by_workflow
        assert len(scheduler.cache.workflows()) <= THREADS
    for thread in range(THREADS):
        graphs.threaded.checkpointer.delete_thread(f"t{thread}")
    settled(orla)
    assert orla.statistics().workflows.idle == 0
    for scheduler in orla.core.serving.schedulers.values():
        assert not scheduler.cache.workflows()
    slots = orla.core.serving.schedulers["slots"].cache.table
    assert slots is not None and not any(slot.owner or slot.held or slot.busy for slot in slots.slots)
    for wrapped in (graphs.threaded, graphs.single):
        handler = handlers_of(wrapped)[-1]
        assert not handler._nodes and not len(handler._heard)
    # LangGraph's ended tasks may still hold the exceptions of a few calls, with their frames; none is under way.
    flights = [inflight for inflight in alive(InFlightCall) if inflight.services is orla.core.serving.services]
    assert not any(inflight._open for inflight in flights)
    assert len(flights) < RUNS / 100
    assert len(alive(RunState)) < RUNS / 100
    assert (engine.in_flight, slotted.in_flight) == (0, 0)

    orla.close()
    left = {thread.name for thread in set(threading.enumerate()) - threads_before if thread.is_alive()}
    assert not left


def test_two_calls_never_sit_in_one_slot(slotted: StubEngine, make_orla: Any) -> None:
    slotted.rule = lambda seen: Reply(before_s=0.003)
    orla = make_orla(replace(with_slots(slotted), max_saved=0), mapper={"*": "slots"})
    llm = chat(slotted)

    def stage(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("a", stage).add_node("b", stage)
    wrapped = orla.wrap(graph.add_edge(START, "a").add_edge("a", "b").compile())
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda n: wrapped.invoke({"messages": [("user", f"number {n}")]}), range(150)))
    settled(orla)
    assert slotted.collisions == 0
    assert slotted.peak == 4, "all slots were used, and no more"
    assert {seen.body["id_slot"] for seen in slotted.chats} == {0, 1, 2, 3}
    second = [record for record in orla.records() if record.stage == "b"]
    reused = [record for record in second if record.cache_action == "reused"]
    assert len(reused) == len(second) == 150, "a run keeps its slot from stage to stage"
    assert all((record.cached_tokens or 0) >= 3 for record in reused), "and finds its prompt there"
    assert slotted.erased > 0 and {record.model for record in second} == {MODEL}
    assert_nothing_left(orla)
