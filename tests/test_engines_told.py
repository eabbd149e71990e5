"""What engines of each kind are told of workflows while graphs run, and what is counted where they cannot be told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, ChatOrla, Orla, OrlaSaver
from tests.conftest import at
from tests.stub_engine import StubEngine
from tests.wire.ollama_server import OllamaServer
from tests.wire.sglang_server import MODEL, SGLangServer

QUESTION = {"messages": [("user", "hello")]}
PATIENCE_S = 60.0

MakeOrla = Callable[..., Orla]


def until(condition: Callable[[], Any]) -> None:
    """Wait for what happens off the request path."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def chain(orla: Orla, *models: str, **compile_with: Any) -> Any:
    """Return a wrapped graph whose nodes call one model after the other."""
    graph = StateGraph(MessagesState)
    before = START
    for number, model in enumerate(models):
        llm = ChatOrla(orla=orla, model=model, max_tokens=4)

        def node(state: MessagesState, llm: ChatOrla = llm) -> Any:
            return {"messages": [llm.invoke(state["messages"])]}

        graph.add_node(f"n{number}", node)
        graph.add_edge(before, f"n{number}")
        before = f"n{number}"
    return orla.wrap(graph.compile(**compile_with))


def effects(orla: Orla, backend: str = "main") -> dict[str, int]:
    return orla.statistics().backends[backend].memory.effects


def on_thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


# Any compatible server


def test_a_plain_engine_is_told_nothing_and_every_order_is_counted_as_unsupported(
    engine: StubEngine, make_orla: MakeOrla
) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    saver = OrlaSaver(orla, inner=InMemorySaver())
    graph = chain(orla, "main", "main", checkpointer=saver)
    chain(orla, "main", "main").invoke(QUESTION)  # over: a flush
    graph.invoke(QUESTION, on_thread("t"))  # idle: a release
    saver.delete_thread("t")  # gone: a flush
    ChatOrla(orla=orla, model="main").invoke("hello")  # a call of nobody
    told = effects(orla)
    assert told["flush:unsupported"] >= 2 and told["release:unsupported"] >= 2
    assert {order.partition(":")[2] for order in told} == {"unsupported"}
    told_of = [seen for seen in engine.requests if seen.body or seen.method == "GET"]  # empty ones ask for wires
    assert {seen.path for seen in told_of} <= {"/v1/models", "/v1/chat/completions"}
    assert not {"session_id", "priority", "id_slot", "keep_alive"} & {
        key for seen in engine.chats for key in seen.body
    }
    assert {record.cache_action for record in orla.records()} == {"engine"}
    assert orla.statistics().backends["main"].admission is not None


# SGLang


@pytest.fixture
def sglang() -> Iterator[SGLangServer]:
    with SGLangServer() as server:
        yield server


def on(server: SGLangServer | OllamaServer, engine: str, name: str = "main") -> Backend:
    return Backend(name, server.url, MODEL, engine)


def test_sessions_are_closed_when_their_workflows_end(sglang: SGLangServer, make_orla: MakeOrla) -> None:
    orla = make_orla(on(sglang, "sglang"), mapper={"*": "main"})
    graph = chain(orla, "main", "main", checkpointer=InMemorySaver())
    graph.invoke(QUESTION, on_thread("t"))
    assert "main/t" in {seen.body.get("session_id") for seen in sglang.asked("/v1/chat/completions")}
    until(lambda: effects(orla).get("release:demoted") == 1)
    chain(orla, "main", "main").invoke(QUESTION)
    until(lambda: effects(orla).get("flush:demoted") == 1)  # it cannot forget one workflow: it lets it go first
    assert not sglang.machine.sessions


def test_a_call_of_nobody_leaves_no_session_open(sglang: SGLangServer, make_orla: MakeOrla) -> None:
    orla = make_orla(on(sglang, "sglang"), mapper={"*": "main"})
    ChatOrla(orla=orla, model="main", max_tokens=4).invoke("hello")
    until(lambda: effects(orla).get("release:demoted") == 1)
    assert not sglang.machine.sessions
    assert not any("session_id" in seen.body for seen in sglang.asked("/v1/chat/completions"))


def test_what_is_open_when_an_orla_closes_is_closed(sglang: SGLangServer, make_orla: MakeOrla) -> None:
    orla = make_orla(on(sglang, "sglang"), mapper={"*": "main"}, memory=Keeps())
    chain(orla, "main", "main", checkpointer=InMemorySaver()).invoke(QUESTION, on_thread("t"))
    assert sglang.machine.sessions == {"main/t"}
    orla.close()
    assert not sglang.machine.sessions


class Keeps:
    """Orders nothing."""

    def decide(self, event: Any) -> tuple[()]:
        return ()


def test_leaving_one_backend_of_a_server_leaves_the_other_s_session(
    sglang: SGLangServer, make_orla: MakeOrla
) -> None:
    orla = make_orla(on(sglang, "sglang", "one"), on(sglang, "sglang", "two"), mapper={"n0": "one", "n1": "two"})
    open_at: list[set[str]] = []
    machine = sglang.machine
    orla.subscribe(lambda event: open_at.append(set(machine.sessions)))
    chain(orla, "one", "two", checkpointer=InMemorySaver()).invoke(QUESTION, on_thread("t"))
    until(lambda: not machine.sessions)
    assert {"one/t"} in open_at and any("two/t" in sessions for sessions in open_at)
    assert effects(orla, "one").get("release:demoted") == 1, "the switch: its place at the first is given back"


@pytest.mark.engines
def test_on_a_real_sglang_what_ends_leaves_what_others_have(real_sglang: Backend, make_orla: MakeOrla) -> None:
    orla = make_orla(replace(real_sglang, name="main"), mapper={"*": "main"})
    thread = chain(orla, "main", "main", checkpointer=InMemorySaver())
    thread.invoke(lengthy("mine"), on_thread(f"t-{time.time_ns()}"))
    first = orla.records()[0]
    chain(orla, "main", "main").invoke(lengthy("other"))
    until(lambda: effects(orla).get("flush:demoted") == 1)
    thread.invoke(lengthy("mine"), on_thread(f"again-{time.time_ns()}"))
    again = orla.records()[-2]
    assert first.prompt_tokens and (first.cached_tokens or 0) < first.prompt_tokens / 2
    assert (again.cached_tokens or 0) > first.prompt_tokens * 0.9, "another workflow was flushed"


def lengthy(name: str) -> Any:
    return {"messages": [("user", f"{time.time_ns() // 10**12} {name} " + "word " * 300)]}


# Ollama


def test_a_model_stays_loaded_for_what_is_learned_of_its_workflows(make_orla: MakeOrla) -> None:
    with OllamaServer() as server:
        orla = make_orla(on(server, "ollama"), mapper={"*": "main"})
        graph = chain(orla, "main", "main")
        orla.core.serving.memory.keep_s = lambda call: 900.0  # type: ignore[method-assign]  # as learned of slow tools
        graph.invoke(QUESTION)
        until(lambda: effects(orla).get("linger:pinned"))
        assert [seen.body for seen in server.asked("/api/generate")] == [
            {"model": MODEL, "stream": False, "keep_alive": 1125}
        ]
        assert effects(orla)["linger:pinned"] == 1, "told once for all its calls"
        assert server.stay_s == 1125
