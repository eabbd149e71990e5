"""What is posted holds for graphs that are linked to the server, as it is now and as it comes to be."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.errors import AccessDenied
from orla_lg.serve.posted.items import PostedStage
from orla_lg.serve.store.store import MemoryStore
from tests.serve.fixtures import until
from tests.serve.in_thread import server
from tests.serve.posted.test_applying import backend, put, ready
from tests.stub_engine import StubEngine


def graph(orla: Orla) -> Any:
    def solve(state: MessagesState) -> dict[str, Any]:
        client = ChatOpenAI(model="light", api_key="x", base_url="http://127.0.0.1:9/v1", max_retries=0, max_tokens=9)
        return {"messages": [client.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("solve", solve)
    builder.add_edge(START, "solve")
    builder.add_edge("solve", END)
    return orla.wrap(builder)


def test_a_linked_graph_s_stages_go_where_they_are_posted_to(engine: StubEngine, other_engine: StubEngine) -> None:
    with server() as running:
        ready(running)
        put(running, backend("light", engine))
        with Orla.remote(running.url) as orla:
            wrapped = graph(orla)

            def ran_at(at: StubEngine) -> bool:
                before = len(at.requests)
                wrapped.invoke({"messages": [("user", "hello")]})
                return len(at.requests) > before

            assert ran_at(engine)
            put(running, backend("heavy", other_engine))
            put(running, PostedStage(id="solve", backend="heavy"))
            until(lambda: ran_at(other_engine), 5)
            put(running, backend("heavy", engine))  # another engine under its name
            until(lambda: ran_at(engine), 5)
            put(running, PostedStage(id="solve"))
            assert ran_at(engine) and orla.records()[-1].backend == "light"


def test_a_policy_that_cannot_be_read_closes_linked_graphs_too(engine: StubEngine) -> None:
    store = MemoryStore()
    with server(store=store) as running:
        ready(running)
        put(running, backend("light", engine))
        with Orla.remote(running.url) as orla:
            wrapped, asked = graph(orla), {"messages": [("user", "hello")]}
            wrapped.invoke(asked)
            store.put("posted/policies/p", b'{"from": "a newer version"}')
            until(lambda: running.orla.core.serving.guard.closed == "p", 5)
            before = len(engine.chats)
            with pytest.raises(AccessDenied, match="cannot be read"):
                wrapped.invoke(asked)
            assert len(engine.chats) == before
            store.put("posted/policies/p", None)
            until(lambda: not running.orla.core.serving.guard.closed, 5)
            wrapped.invoke(asked)
