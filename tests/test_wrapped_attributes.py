"""What a user set on a compiled graph is there on the wrapped one."""

from __future__ import annotations

from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla

Graph = Any


class BackendScheduler(type(StateGraph(MessagesState).add_node("a", lambda s: s).add_edge(START, "a").compile())):  # type: ignore[misc]
    """A graph type of an application, with a default that its instances overrule."""

    greeting = "none"


def state_graph() -> Graph:
    graph = StateGraph(MessagesState).add_node("ask", lambda state: {"messages": []}).add_edge(START, "ask")
    return graph.compile(checkpointer=InMemorySaver(), name="desk")


def functional() -> Graph:
    @entrypoint(checkpointer=InMemorySaver())
    def ask(question: str) -> str:
        return question

    return ask


def subclassed() -> Graph:
    graph = state_graph()
    graph.__class__ = BackendScheduler
    graph.greeting = "hello"
    return graph


@pytest.mark.parametrize("build", [state_graph, functional, subclassed])
def test_attributes_set_on_the_graph_are_kept(orla: Orla, build: Any) -> None:
    bare = build()
    bare.registry, bare._owner, bare.input_note = {"a": 1}, "billing", None
    bare.step_timeout, bare.stream_mode = 7.0, "updates"  # of LangGraph's own, set late
    wrapped = orla.wrap(bare)
    assert type(wrapped) is type(bare)
    for name in vars(bare):
        if name not in ("checkpointer", "config", "nodes", "trigger_to_nodes"):
            assert getattr(wrapped, name) == getattr(bare, name), name
    assert set(vars(bare)) <= set(vars(wrapped))
    assert wrapped.nodes == bare.nodes and wrapped.trigger_to_nodes == bare.trigger_to_nodes
    assert wrapped.registry is bare.registry
    wrapped.registry = "other"
    assert bare.registry == {"a": 1}
    assert set(vars(orla.wrap(wrapped))) >= set(vars(bare))  # and by wrapping again
