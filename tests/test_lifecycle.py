"""How runs end, what becomes of their workflows, and that a grant is given back on every way out."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import openai
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from orla_lg import CallEvent, ChatOrla, DeadlineExceeded, Happening, Orla, QueueFull
from tests.conftest import CALLER_KEY, at, chat
from tests.stub_engine import Gate, Reply, Seen, StubEngine

MESSAGES: Any = [{"role": "user", "content": "hello"}]
QUESTION = {"messages": [("user", "hello")]}
PATIENCE_S = 60.0


class Watch:
    """Hears what an Orla tells, and waits for it."""

    def __init__(self, orla: Orla) -> None:
        self.heard: list[CallEvent] = []
        self._changed = threading.Condition()
        orla.subscribe(self._hear)

    def _hear(self, event: CallEvent) -> None:
        with self._changed:
            self.heard.append(event)
            self._changed.notify_all()

    def of(self, kind: Happening) -> list[CallEvent]:
        return [event for event in self.heard if event.kind is kind]

    def wait(self, kind: Happening, count: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(kind)) >= count, PATIENCE_S), kind

    async def await_(self, kind: Happening, count: int = 1) -> None:
        await asyncio.to_thread(self.wait, kind, count)

    @property
    def ends(self) -> list[str]:
        return [event.detail for event in self.of(Happening.RUN_ENDED)]


def on_thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


def graph_of(body: Callable[[MessagesState], Any], **compile_with: Any) -> Any:
    graph = StateGraph(MessagesState).add_node("ask", body).add_edge(START, "ask")
    return graph.compile(**compile_with)


# ── how runs end ─────────────────────────────────────────────────────────────────────────────────────


def two_nodes(engine: StubEngine, *, asynchronous: bool = False, **compile_with: Any) -> Any:
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    async def aask(state: MessagesState) -> Any:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    node: Any = aask if asynchronous else ask
    graph = StateGraph(MessagesState).add_node("a", node).add_node("b", node)
    return graph.add_edge(START, "a").add_edge("a", "b").compile(**compile_with)


def test_done(engine: StubEngine, orla: Orla) -> None:
    watch = Watch(orla)
    graph = orla.wrap(two_nodes(engine))
    graph.invoke(QUESTION)
    asyncio.run(graph.ainvoke(QUESTION))
    assert watch.ends == ["done", "done"]
    assert [event.stage for event in watch.of(Happening.NODE_LEFT)] == ["a", "b", "a", "b"]


def test_failed(engine: StubEngine, orla: Orla) -> None:
    watch = Watch(orla)
    engine.rule = lambda seen: Reply(status=400)
    graph = orla.wrap(two_nodes(engine))
    for run in (lambda: graph.invoke(QUESTION), lambda: asyncio.run(graph.ainvoke(QUESTION))):
        with pytest.raises(openai.BadRequestError):
            run()
    assert watch.ends == ["failed", "failed"]
    assert all("BadRequestError" in (record.error or "") for record in orla.records())


async def test_cancelled(engine: StubEngine, orla: Orla) -> None:
    watch = Watch(orla)
    engine.rule = lambda seen: Reply(fault="hang")
    graph = orla.wrap(two_nodes(engine, asynchronous=True))
    task = asyncio.get_running_loop().create_task(graph.ainvoke(QUESTION))
    await engine.await_(lambda e: e.in_flight == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.await_(lambda e: e.in_flight == 0)
    assert watch.ends == ["cancelled"]


def test_abandoned(engine: StubEngine, orla: Orla) -> None:
    watch = Watch(orla)
    graph = orla.wrap(two_nodes(engine))
    closed = graph.stream(QUESTION, stream_mode="updates")
    next(closed)
    closed.close()
    assert watch.ends == ["abandoned"]
    for _ in graph.stream(QUESTION, stream_mode="updates"):
        break
    gc.collect()
    watch.wait(Happening.RUN_ENDED, 2)
    assert watch.ends == ["abandoned", "abandoned"]


async def test_asynchronously_abandoned(engine: StubEngine, orla: Orla) -> None:
    watch = Watch(orla)
    graph = orla.wrap(two_nodes(engine, asynchronous=True))
    closed = graph.astream(QUESTION, stream_mode="updates")
    await anext(closed)
    await closed.aclose()
    assert watch.ends == ["abandoned"]
    dropped = graph.astream(QUESTION, stream_mode="updates")
    await anext(dropped)
    del dropped
    gc.collect()
    await watch.await_(Happening.RUN_ENDED, 2)
    assert watch.ends[1] in ("abandoned", "cancelled")


def test_interrupted_and_resumed(engine: StubEngine, orla: Orla) -> None:
    watch, llm = Watch(orla), chat(engine)

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(interrupt("go on?"))]}

    graph = orla.wrap(graph_of(ask, checkpointer=InMemorySaver()))
    graph.invoke(QUESTION, on_thread("t"))
    assert watch.ends == ["interrupted"]
    assert orla.statistics().workflows.idle == 1
    graph.invoke(Command(resume="yes"), on_thread("t"))
    assert watch.ends == ["interrupted", "done"]
    assert {event.workflow for event in watch.of(Happening.RUN_STARTED)} == {"t"}


def test_a_static_interrupt_is_one(engine: StubEngine, orla: Orla) -> None:
    watch = Watch(orla)
    graph = orla.wrap(two_nodes(engine, checkpointer=InMemorySaver(), interrupt_before=["b"]))
    graph.invoke(QUESTION, on_thread("t"))
    graph.invoke(None, on_thread("t"))
    assert watch.ends == ["interrupted", "done"]


# ── workflows and their cache ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def slotted() -> Iterator[StubEngine]:
    with StubEngine(slots=2) as running:
        yield running


@pytest.fixture
def slots(slotted: StubEngine, make_orla: Any) -> Orla:
    made: Orla = make_orla(at(slotted, "slots", engine="llamacpp"), mapper={"*": "slots"})
    return made


def owners(orla: Orla) -> set[tuple[str | None, bool]]:
    """Return who has a slot, and whether it is held."""
    table = orla.core.serving.schedulers["slots"].cache.table
    assert table is not None
    return {(slot.owner, slot.held) for slot in table.slots if slot.owner is not None}


def test_a_thread_is_idle_after_its_run_and_over_when_deleted(slotted: StubEngine, slots: Orla) -> None:
    seen = []

    def ask(state: MessagesState) -> Any:
        said = chat(slotted).invoke(state["messages"])
        seen.append(owners(slots))
        return {"messages": [said]}

    graph = slots.wrap(graph_of(ask, checkpointer=InMemorySaver()))
    graph.invoke(QUESTION, on_thread("t"))
    assert seen == [{("t", True)}], "held while the run may call again"
    assert owners(slots) == {("t", False)}, "remembered, but free to be taken"
    assert slots.statistics().backends["slots"].memory.workflows == 1
    graph.invoke(QUESTION, on_thread("t"))
    assert slots.records()[-1].cache_action == "reused" and (slots.records()[-1].cached_tokens or 0) > 0
    graph.checkpointer.delete_thread("t")
    assert owners(slots) == set() and slots.statistics().backends["slots"].memory.workflows == 0
    slotted.wait(lambda e: e.erased == 1)


def test_a_run_without_thread_is_over_at_its_end(slotted: StubEngine, slots: Orla) -> None:
    slots.wrap(two_nodes(slotted)).invoke(QUESTION)
    assert owners(slots) == set()
    slotted.wait(lambda e: e.erased == 1)
    assert [record.cache_action for record in slots.records()] == ["claimed", "reused"]


@pytest.mark.parametrize("memory", ["default", "flush_at_boundary"])
def test_what_goes_to_and_fro_between_two_backends_finds_its_cache_on_both(make_orla: Any, memory: str) -> None:
    with StubEngine(slots=2) as light, StubEngine(slots=2) as heavy:
        orla = make_orla(
            at(light, "light", engine="llamacpp"), at(heavy, "heavy", engine="llamacpp"),
            mapper={"a": "light", "b": "heavy"}, memory=memory,
        )  # fmt: skip
        graph = orla.wrap(two_nodes(light, checkpointer=InMemorySaver()))
        for _ in range(2):
            graph.invoke(QUESTION, on_thread("t"))
        found = [record.cached_tokens for record in orla.records()][2:]
        assert [tokens > 0 for tokens in found] == [memory == "default"] * 2


async def test_asynchronous_deletion(slotted: StubEngine, slots: Orla) -> None:
    graph = slots.wrap(two_nodes(slotted, checkpointer=InMemorySaver()))
    await graph.ainvoke(QUESTION, on_thread("t"))
    assert owners(slots) == {("t", False)}
    await graph.checkpointer.adelete_thread("t")
    assert owners(slots) == set() and slots.statistics().workflows.idle == 0


def test_two_runs_on_one_thread_are_one_workflow(engine: StubEngine, orla: Orla) -> None:
    watch, gate = Watch(orla), Gate()
    engine.rule = lambda seen: Reply(gate=gate) if "first" in seen.last else None
    graph = orla.wrap(graph_of(lambda state: {"messages": [chat(engine).invoke(state["messages"][-1:])]}))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(graph.invoke, {"messages": [("user", "first")]}, on_thread("t"))
        engine.wait(lambda e: e.in_flight == 1)
        graph.invoke({"messages": [("user", "second")]}, on_thread("t"))
        now = orla.statistics().workflows
        assert (now.runs, now.running, now.idle) == (1, 1, 0), "the thread is not idle while one of its runs is open"
        gate.open()
        first.result(PATIENCE_S)
    assert {record.workflow for record in orla.records()} == {"t"}
    assert len({record.run for record in orla.records()}) == 2 and watch.ends == ["done", "done"]
    assert orla.statistics().workflows.idle == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_graph_with_a_thread_of_its_own_is_a_workflow_of_its_own(
    engine: StubEngine, orla: Orla, asynchronous: bool
) -> None:
    parents = {}
    inner = two_nodes(engine, checkpointer=InMemorySaver())

    def outer(state: MessagesState) -> Any:
        chat(engine).invoke("before")
        inner.invoke(QUESTION, on_thread("inner"))
        return {"messages": [chat(engine).invoke("after")]}

    started = orla.core.serving.progress.run_started

    def listening(run: str, *, thread: str | None, parent: str | None = None, **rest: Any) -> Any:
        parents[thread] = parent
        return started(run, thread=thread, parent=parent, **rest)

    orla.core.serving.progress.run_started = listening  # type: ignore[method-assign]
    graph = orla.wrap(graph_of(outer, checkpointer=InMemorySaver()))
    if asynchronous:
        asyncio.run(graph.ainvoke(QUESTION, on_thread("outer")))
    else:
        graph.invoke(QUESTION, on_thread("outer"))
    assert [record.workflow for record in orla.records()] == ["outer", "inner", "inner", "outer"]
    assert len({record.run for record in orla.records()}) == 2
    assert parents == {"outer": None, "inner": "outer"}
    assert orla.statistics().workflows.outcomes == {"done": 2}


# ── every way out gives the grant back ───────────────────────────────────────────────────────────────


class Broken(Exception):
    """What a consumer may raise."""


@pytest.fixture
def narrow(engine: StubEngine, make_orla: Any) -> Orla:
    """An Orla that lets one call in at a time."""
    made: Orla = make_orla(at(engine, max_concurrency=1), mapper={"*": "main"})
    return made


def in_flight(orla: Orla) -> int:
    return orla.statistics().backends["main"].queue.in_flight


def assert_given_back(orla: Orla) -> None:
    """Assert that no grant is out, or soon is not: what the collector ends gives its grant back in another thread."""
    deadline = time.monotonic() + PATIENCE_S
    while in_flight(orla) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert in_flight(orla) == 0


def read_to_the_end(stream: Any) -> None:
    assert len(list(stream)) > 3


def close_early(stream: Any) -> None:
    next(iter(stream))
    stream.close()


def close_unread(stream: Any) -> None:
    stream.close()


def leave_the_block(stream: Any) -> None:
    with stream:
        next(iter(stream))


def fail_in_the_block(stream: Any) -> None:
    with suppress(Broken), stream:
        for _ in stream:
            raise Broken


def read_half(stream: Any) -> None:
    next(iter(stream))


def do_not_read(stream: Any) -> None: ...


WAYS_OUT = {
    read_to_the_end: None,
    close_early: "abandoned",
    close_unread: "abandoned",
    leave_the_block: "abandoned",
    fail_in_the_block: "abandoned",
    read_half: "abandoned",
    do_not_read: "abandoned",
}


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_a_stream(engine: StubEngine, narrow: Orla, way_out: Callable[[Any], None]) -> None:
    if way_out is not read_to_the_end:
        engine.script.append(Reply(mid_gate=Gate()))  # never opened: the engine still generates
    client = openai.OpenAI(base_url=engine.url, api_key=CALLER_KEY, max_retries=0)

    def ask(state: MessagesState) -> Any:
        stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        assert in_flight(narrow) == 1, "a stream holds its grant until it ends"
        way_out(stream)
        del stream
        gc.collect()
        assert_given_back(narrow)

    narrow.wrap(graph_of(ask)).invoke(QUESTION)
    assert [record.error for record in narrow.records()] == [WAYS_OUT[way_out]]
    engine.wait(lambda e: e.in_flight == 0)
    narrow.wrap(two_nodes(engine)).invoke(QUESTION)


async def aread_to_the_end(stream: Any) -> None:
    assert len([chunk async for chunk in stream]) > 3


async def aclose_early(stream: Any) -> None:
    await anext(aiter(stream))
    await stream.close()


async def aclose_unread(stream: Any) -> None:
    await stream.close()


async def afail_in_the_block(stream: Any) -> None:
    with suppress(Broken):
        async with stream:
            async for _ in stream:
                raise Broken


async def aread_half(stream: Any) -> None:
    await anext(aiter(stream))


async def ado_not_read(stream: Any) -> None: ...


@pytest.mark.parametrize(
    "way_out", [aread_to_the_end, aclose_early, aclose_unread, afail_in_the_block, aread_half, ado_not_read]
)
async def test_an_asynchronous_stream(engine: StubEngine, narrow: Orla, way_out: Any) -> None:
    whole = way_out is aread_to_the_end
    if not whole:
        engine.script.append(Reply(mid_gate=Gate()))
    client = openai.AsyncOpenAI(base_url=engine.url, api_key=CALLER_KEY, max_retries=0)

    async def ask(state: MessagesState) -> Any:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        assert in_flight(narrow) == 1
        await way_out(stream)

    await narrow.wrap(graph_of(ask)).ainvoke(QUESTION)
    gc.collect()
    await engine.await_(lambda e: e.in_flight == 0)
    assert_given_back(narrow)
    assert [record.error for record in narrow.records()] == [None if whole else "abandoned"]
    await narrow.wrap(two_nodes(engine, asynchronous=True)).ainvoke(QUESTION)


@pytest.mark.parametrize("where", ["connecting", "mid-stream"])
async def test_cancelled_on_the_way(engine: StubEngine, narrow: Orla, where: str) -> None:
    engine.script.append(Reply(gate=Gate()) if where == "connecting" else Reply(mid_gate=Gate()))
    begun = asyncio.Event()

    # The SDK itself: on Python 3.11 a stock model's ``astream`` does not end when cancelled between chunks.
    client = openai.AsyncOpenAI(base_url=engine.url, api_key=CALLER_KEY, max_retries=0)

    async def ask(state: MessagesState) -> Any:
        async with await client.chat.completions.create(model="m", messages=MESSAGES, stream=True) as stream:
            async for _ in stream:
                begun.set()

    task = asyncio.get_running_loop().create_task(narrow.wrap(graph_of(ask)).ainvoke(QUESTION))
    await (begun.wait() if where == "mid-stream" else engine.await_(lambda e: e.in_flight == 1))
    assert in_flight(narrow) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert in_flight(narrow) == 0
    await engine.await_(lambda e: e.in_flight == 0)
    (record,) = narrow.records()
    assert record.error is not None and record.error.startswith(("CancelledError", "abandoned"))


async def test_cancelled_while_queued(engine: StubEngine, narrow: Orla) -> None:
    watch, gate, llm = Watch(narrow), Gate(), ChatOrla(orla=narrow, model="main")
    engine.script.append(Reply(gate=gate))
    loop = asyncio.get_running_loop()
    first = loop.create_task(llm.ainvoke("first"))
    await engine.await_(lambda e: e.in_flight == 1)
    second = loop.create_task(llm.ainvoke("second"))
    await watch.await_(Happening.QUEUED)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert narrow.statistics().backends["main"].queue.waiting == 0
    gate.open()
    await first
    assert [seen.last for seen in engine.chats] == ["first"]
    cancelled, served = narrow.records()
    assert (cancelled.error or "").startswith("CancelledError") and cancelled.attempts == 0
    assert served.error is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_deadline(engine: StubEngine, narrow: Orla, asynchronous: bool) -> None:
    gate, llm = Gate(), ChatOrla(orla=narrow, model="main")
    engine.script.append(Reply(gate=gate))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(llm.invoke, "first")
        engine.wait(lambda e: e.in_flight == 1)
        with pytest.raises(DeadlineExceeded, match=r"the deadline was 0\.05 s"):
            if asynchronous:
                asyncio.run(llm.ainvoke("second", deadline_s=0.05))
            else:
                llm.invoke("second", deadline_s=0.05)
        assert narrow.statistics().backends["main"].queue.waiting == 0
        gate.open()
        first.result(PATIENCE_S)
    assert len(engine.chats) == 1


def test_queue_full(engine: StubEngine, make_orla: Any) -> None:
    orla = make_orla(at(engine, max_concurrency=1, capacity=1))
    watch, gate, llm = Watch(orla), Gate(), ChatOrla(orla=orla, model="main")
    engine.script.append(Reply(gate=gate))
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(llm.invoke, "first")]
        engine.wait(lambda e: e.in_flight == 1)
        running.append(pool.submit(llm.invoke, "second"))
        watch.wait(Happening.QUEUED)
        with pytest.raises(QueueFull, match="its capacity is 1"):
            llm.invoke("third")
        gate.open()
        for each in running:
            each.result(PATIENCE_S)
    assert orla.statistics().backends["main"].queue.refused == 1
    assert [seen.last for seen in engine.chats] == ["first", "second"]


def test_who_pauses_before_a_retry_holds_no_grant(engine: StubEngine, narrow: Orla) -> None:
    watch, gate, llm = Watch(narrow), Gate(), ChatOrla(orla=narrow, model="main", max_retries=1)
    engine.script.append(Reply(gate=gate, status=503, headers=(("retry-after", "0.5"),)))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(llm.invoke, "first")
        engine.wait(lambda e: e.in_flight == 1)
        second = pool.submit(llm.invoke, "second")
        watch.wait(Happening.QUEUED)
        gate.open()
        second.result(PATIENCE_S)
        first.result(PATIENCE_S)
    assert [seen.last for seen in engine.chats] == ["first", "second", "first"]
    assert sorted(record.attempts for record in narrow.records()) == [1, 2]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_while_a_stream_is_read_enters_at_once(engine: StubEngine, narrow: Orla, asynchronous: bool) -> None:
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        for count, _ in enumerate(llm.stream("outer")):
            if count == 1:
                llm.invoke("inner")

    async def aask(state: MessagesState) -> Any:
        count = 0
        async for _ in llm.astream("outer"):
            if (count := count + 1) == 2:
                await llm.ainvoke("inner")

    def outer_waits_for_inner(seen: Seen) -> Reply | None:
        return Reply(mid_gate=gate) if seen.last == "outer" else Reply()

    gate = Gate()
    engine.rule = outer_waits_for_inner
    watch = Watch(narrow)
    narrow.subscribe(lambda event: gate.open() if event.kind is Happening.FINISHED else None)
    graph = narrow.wrap(graph_of(aask if asynchronous else ask))
    asyncio.run(graph.ainvoke(QUESTION)) if asynchronous else graph.invoke(QUESTION)
    queue = narrow.statistics().backends["main"].queue
    assert (queue.granted, queue.extra) == (2, 1)
    assert not watch.of(Happening.QUEUED)


def test_another_runs_call_waits_while_a_stream_is_read(engine: StubEngine, narrow: Orla) -> None:
    """The exception is for who holds the grant, not for everybody."""
    watch, gate = Watch(narrow), Gate()
    engine.script.append(Reply(mid_gate=gate))
    llm = ChatOrla(orla=narrow, model="main")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: list(llm.stream("first")))
        watch.wait(Happening.FIRST_TOKEN)
        second = pool.submit(llm.invoke, "second")
        watch.wait(Happening.QUEUED)
        assert len(engine.chats) == 1
        gate.open()
        first.result(PATIENCE_S)
        second.result(PATIENCE_S)
    assert narrow.statistics().backends["main"].queue.extra == 0


@pytest.mark.parametrize("fault", ["reset", "cut", "garbage"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [chat, None])
def test_a_broken_answer(engine: StubEngine, narrow: Orla, fault: Any, stream: bool, model: Any) -> None:
    engine.script.append(Reply(fault=fault))
    llm = chat(engine) if model else ChatOrla(orla=narrow, model="main", max_retries=0)

    def ask(state: MessagesState) -> Any:
        with pytest.raises(Exception) as caught:
            list(llm.stream("hello")) if stream else llm.invoke("hello")
        assert not isinstance(caught.value, AssertionError | AttributeError | KeyError | IndexError)
        assert in_flight(narrow) == 0
        return {"messages": [llm.invoke("again")]}

    narrow.wrap(graph_of(ask)).invoke(QUESTION)
    broken, well = narrow.records()
    assert well.error is None
    if fault != "garbage":  # what the SDK finds in an answer that came whole is not ours to know
        assert broken.error is not None
