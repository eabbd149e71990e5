"""What ``wrap`` takes, and what it never does: wait in a running loop, or change what it was given."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.runnables import RunnableBinding, RunnableLambda
from langchain_core.runnables.base import RunnableEach
from langchain_core.runnables.fallbacks import RunnableWithFallbacks
from langchain_core.runnables.retry import RunnableRetry
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, MappingError, Orla, OrlaError
from orla_lg.graph.wrap import is_binding
from tests.conftest import at, chat
from tests.stub_engine import StubEngine

HI: Any = {"messages": [("user", "hi")]}
MakeOrla = Callable[..., Orla]

try:
    from blockbuster import blockbuster_ctx
except ImportError:
    blockbuster_ctx = None


def asking(engine: StubEngine, name: str = "ask") -> Any:
    llm = chat(engine)

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    async def anode(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    return StateGraph(MessagesState).add_node(name, RunnableLambda(node, anode)).add_edge(START, name)


# In a running loop


@pytest.fixture
def hanging_url() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


async def stalled_s(done: asyncio.Event) -> float:
    """Return the longest time for which the loop did nothing else."""
    longest_s, last_s = 0.0, time.perf_counter()
    while not done.is_set():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest_s, last_s = max(longest_s, now - last_s), now
    return longest_s


async def test_in_a_running_loop_it_waits_for_no_backend(
    engine: StubEngine, make_orla: MakeOrla, hanging_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orla_lg.orla.CONNECT_PATIENCE_S", 60.0)
    monkeypatch.setattr("orla_lg.core.placement.candidates.PROBE_PATIENCE_S", 60.0)
    hang = [Backend(f"hangs{n}", hanging_url) for n in range(3)]
    orla, builder = make_orla(*hang, at(engine), mapper={"*": "main"}), asking(engine)
    done = asyncio.Event()
    watching = asyncio.ensure_future(stalled_s(done))  # noqa: TID251 - a test of the loop itself
    await asyncio.sleep(0.01)
    started = time.perf_counter()
    graph = orla.wrap(builder)
    wrapped_s = time.perf_counter() - started
    await graph.ainvoke(HI)
    done.set()
    assert wrapped_s < 20 and await watching < 20, "of the minute that an engine is waited for elsewhere"
    assert time.perf_counter() - started < 20 and orla.records()[-1].backend == "main"


@pytest.mark.skipif(blockbuster_ctx is None, reason="blockbuster is not installed")
async def test_a_detector_of_blocking_calls_finds_nothing(
    engine: StubEngine, make_orla: MakeOrla, hanging_url: str
) -> None:
    assert blockbuster_ctx is not None
    orla, builder = make_orla(Backend("hangs", hanging_url), at(engine), mapper={"*": "main"}), asking(engine)
    orla.core.clients["main"].on_loop()  # certificates and the like are read when the SDK's client is made
    with blockbuster_ctx(scanned_modules=["orla_lg"]):
        await orla.wrap(builder).ainvoke(HI)


async def test_what_could_not_be_learned_then_is_checked_before_the_first_call_is_queued(
    make_orla: MakeOrla,
) -> None:
    with StubEngine(models=("bge-embed", "qwen3:8b")) as engine:
        missing = make_orla(at(engine, model="gone"), mapper={"*": "main"}).wrap(asking(engine))
        with pytest.raises(MappingError, match="stage 'ask' on backend 'main': model 'gone' is not served there"):
            await missing.ainvoke(HI)
        several_orla = make_orla(at(engine, model=None), mapper={"*": "main"})
        several = several_orla.wrap(asking(engine))
        with pytest.raises(MappingError, match=r"serves several models \(bge-embed, qwen3:8b\)"):
            await several.ainvoke(HI)
        assert [record.attempts for record in several_orla.records()] == [0]


def test_outside_a_loop_all_faults_still_show_at_once(engine: StubEngine, make_orla: MakeOrla) -> None:
    with pytest.raises(MappingError, match="stage '\\*' on backend 'main': model 'gone' is not served there"):
        make_orla(at(engine, model="gone"), mapper=None).wrap(asking(engine), mapper={"*": "main"})


# The model asked for


@pytest.mark.parametrize(("code", "asked"), [("qwen3:8b", "qwen3:8b"), ("bge-embed", "bge-embed"), ("gpt-4o", None)])
def test_a_backend_without_a_model_is_asked_for_the_one_that_the_code_names(
    make_orla: MakeOrla, code: str, asked: str | None
) -> None:
    with StubEngine(models=("bge-embed", "qwen3:8b")) as engine:
        orla = make_orla(at(engine, model=None), mapper={"*": "main"})
        llm = chat(engine, model=code)
        builder = StateGraph(MessagesState).add_node("ask", lambda s: {"messages": [llm.invoke(s["messages"])]})
        graph = orla.wrap(builder.add_edge(START, "ask"))
        if asked is None:
            with pytest.raises(MappingError, match=r"stage 'ask' on backend 'main': .*\(bge-embed, qwen3:8b\)"):
                graph.invoke(HI)
        else:
            assert graph.invoke(HI)["messages"][-1].response_metadata["model_name"] == asked
            assert orla.records()[-1].model == asked


# Bindings of graphs

BINDINGS: dict[str, tuple[Callable[[Any], Any], type]] = {
    "with_types": (lambda graph: graph.with_types(input_type=dict), RunnableBinding),
    "bind": (lambda graph: graph.bind(interrupt_before=None), RunnableBinding),
    "with_retry": (lambda graph: graph.with_retry(stop_after_attempt=2), RunnableRetry),
    "with_listeners": (lambda graph: graph.with_listeners(on_start=lambda run: None), RunnableBinding),
    "with_config of one": (lambda graph: graph.with_types().with_config(tags=["mine"]), RunnableBinding),
    "one in another": (lambda graph: graph.with_retry().with_types().bind().with_listeners(), RunnableBinding),
    "with_fallbacks": (lambda graph: graph.with_fallbacks([graph]), RunnableWithFallbacks),
    "map": (lambda graph: graph.with_retry().map(), RunnableEach),
}


@pytest.mark.parametrize(("bind", "kind"), BINDINGS.values(), ids=BINDINGS)
@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_binding_of_a_graph_is_wrapped_inside(
    engine: StubEngine, make_orla: MakeOrla, bind: Callable[[Any], Any], kind: type, form: str
) -> None:
    orla = make_orla(at(engine, "light"), at(engine), mapper={"*": "main"})
    graph = asking(engine).compile()
    bound = bind(graph)
    before = repr(bound)
    wrapped = orla.wrap(bound, mapper={"ask": "light"})
    given = [HI] if kind is RunnableEach else HI
    assert type(wrapped) is type(bound) is kind and repr(bound) == before

    again = orla.wrap(wrapped)
    assert type(again) is kind

    async def answers() -> list[Any]:  # in one loop, for a model keeps its client for one
        return [await each.ainvoke(given) for each in (bound, wrapped, again)]

    made = asyncio.run(answers()) if form == "async" else [each.invoke(given) for each in (bound, wrapped, again)]
    texts = [(each[0] if isinstance(each, list) else each)["messages"][-1].content for each in made]
    assert texts[0] == texts[1] == texts[2]
    assert [(r.stage, r.backend) for r in orla.records()] == [("ask", "light")] * 2, "wrapped twice, served once"
    assert [each.backends for each in orla.plan(wrapped)] == [("light",)]
    assert orla.outlook(wrapped)


def test_a_retry_retries_the_wrapped_graph_and_a_fallback_is_served_too(
    engine: StubEngine, make_orla: MakeOrla
) -> None:
    orla, tries = make_orla(at(engine), mapper={"*": "main"}), list[str]()
    llm, lock = chat(engine), threading.Lock()

    def fails(state: MessagesState) -> dict[str, Any]:
        made = {"messages": [llm.invoke(state["messages"])]}
        with lock:
            tries.append("tried")
        if len(tries) < 3:
            raise ValueError("not yet")
        return made

    failing = StateGraph(MessagesState).add_node("ask", fails).add_edge(START, "ask").compile()
    retrying = orla.wrap(failing.with_retry(stop_after_attempt=3, wait_exponential_jitter=False))
    retrying.invoke(HI)
    assert (len(tries), len(orla.records())) == (3, 3)
    tries.clear()
    orla.wrap(failing.with_fallbacks([asking(engine, "other").compile()])).invoke(HI)
    assert [record.stage for record in orla.records()[3:]] == ["ask", "other"]


def test_a_binding_without_a_graph_is_refused_clearly(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine))
    for other in (chat(engine).bind(stop=["x"]), RunnableLambda(lambda x: x).with_retry(), RunnableLambda(str).map()):
        assert not is_binding(other)
        with pytest.raises(OrlaError, match="expected a StateGraph or a compiled LangGraph graph, got "):
            orla.wrap(other)
