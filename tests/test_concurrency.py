"""``max_concurrency`` over graphs, loops and threads at once, and calls that leave a full backend and come back."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import ChatOrla, Orla
from orla_lg.mappers import ExplicitMapper, LoadAware
from tests.conftest import at, chat
from tests.stub_engine import Gate, Reply, StubEngine

HI: Any = {"messages": [("user", "hi")]}
PATIENCE_S = 60.0
MakeOrla = Callable[..., Orla]


def graph_of(llm: Any, *stages: str) -> Any:
    """A chain of nodes that wait for the model as a thread or as a task, whichever the graph runs in."""

    def node(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"][:1])]}

    async def anode(state: MessagesState) -> Any:
        return {"messages": [await llm.ainvoke(state["messages"][:1])]}

    builder = StateGraph(MessagesState)
    for before, name in zip((START, *stages), stages, strict=False):
        builder.add_node(name, RunnableLambda(node, afunc=anode)).add_edge(before, name)
    return builder


@pytest.mark.parametrize("bound", [1, 3])
def test_one_bound_for_all_graphs_loops_and_threads(engine: StubEngine, make_orla: MakeOrla, bound: int) -> None:
    orla = make_orla(at(engine, max_concurrency=bound), mapper={"*": "main"})
    graphs = [
        orla.wrap(graph_of(chat(engine), "a", "b")),
        orla.wrap(graph_of(ChatOrla(orla=orla, model="main"), "c")),
    ]
    engine.rule = lambda seen: Reply(before_s=0.005)

    def threaded(number: int) -> None:
        for _ in range(2):
            graphs[number % 2].invoke(HI)

    def looped(number: int) -> None:
        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                for n in range(4):
                    group.create_task(graphs[(number + n) % 2].ainvoke(HI))

        asyncio.run(together())

    with ThreadPoolExecutor(10) as pool:
        for done in [pool.submit(work, n) for n in range(5) for work in (threaded, looped)]:
            done.result(PATIENCE_S)
    # Five threads with 2 runs and five loops with 4: of each the half is of two calls, up to who has the odd one.
    assert len(engine.chats) == 2 * (3 * 2 + 2 * 1) + sum(2 * 2 + 2 * 1 for _ in range(5))
    assert engine.peak == bound, "never more, and as many as may be"
    assert orla.statistics().backends["main"].queue.extra == 0


def test_calls_leave_a_full_backend_and_come_back(
    engine: StubEngine, other_engine: StubEngine, make_orla: MakeOrla
) -> None:
    table = LoadAware(ExplicitMapper({"*": ["main", "spare"]}))
    engine.rule = lambda seen: Reply(before_s=0.3)  # else a wait is so short that staying is right
    orla = make_orla(at(engine, max_concurrency=2), at(other_engine, "spare", max_concurrency=2), mapper=table)
    graph, gate = orla.wrap(graph_of(chat(engine), "ask")), Gate()
    graph.invoke(HI)
    assert (len(engine.chats), len(other_engine.chats)) == (1, 0), "while there is room, it stays at home"
    engine.script.extend([Reply(gate=gate), Reply(gate=gate)])
    soon: Any = {"configurable": {"orla": {"deadline_s": 10.0}}}
    with ThreadPoolExecutor(2) as pool:
        try:
            held = []
            for under_way in (1, 2):  # one after the other: two that come at the same moment may see each other wait
                held.append(pool.submit(graph.invoke, HI))
                engine.wait(lambda e, so_many=under_way: e.in_flight == so_many)  # type: ignore[misc]
            graph.invoke(HI, soon)
            asyncio.run(graph.ainvoke(HI, soon))
            assert (len(engine.chats), len(other_engine.chats)) == (3, 2), "where there was room, waiting for nobody"
        finally:
            gate.open()
        for each in held:
            each.result(PATIENCE_S)
    for invoke in (graph.invoke, lambda question: asyncio.run(graph.ainvoke(question))):
        invoke(HI)
    assert (len(engine.chats), len(other_engine.chats)) == (5, 2), "home again"
    moved = [record for record in orla.records() if record.backend == "spare"]
    assert len(moved) == 2 and all(record.mapper == "load+explicit" for record in moved)
    assert all(record.queue_wait_s < 8.0 for record in moved), "of the 10 s that they had"


@pytest.mark.parametrize("form", ["sdk", "langchain"])
def test_a_stream_that_is_collected_under_the_schedulers_lock_waits_for_nothing(
    engine: StubEngine, make_orla: MakeOrla, form: str
) -> None:
    orla = make_orla(at(engine, max_concurrency=1), mapper={"*": "main"})
    llm = ChatOrla(orla=orla, model="main")

    def drop() -> None:
        stream: Any = llm.stream("hi") if form == "langchain" else llm.client.create(
            model="main", messages=[{"role": "user", "content": "hi"}], stream=True
        )  # fmt: skip
        next(iter(stream))
        held: list[Any] = [stream]
        held.append(held)  # only the cyclic collector finds it
        del stream, held
        with orla.core.serving.schedulers["main"].lock:
            gc.collect()

    gc.collect()
    gc.disable()
    try:
        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        thread.join(20)
    finally:
        gc.enable()
    assert not thread.is_alive(), "the collector waits for a lock that its own thread holds"
    assert llm.invoke("hi").content, "the grant was given back"
