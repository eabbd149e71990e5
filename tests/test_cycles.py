"""A call leaves nothing for the cyclic collector, which would have to look for it: its memory is free when it ends.

Streams are not looked at here: the SDK's own leave a cycle.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.core.inflight import InFlightCall
from tests.conftest import chat
from tests.stub_engine import StubEngine

QUESTION: Any = {"messages": [("user", "hello")]}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[InFlightCall]]]:
    """The calls made, while the collector stands still."""
    made: list[weakref.ref[InFlightCall]] = []
    before = InFlightCall.__init__

    def init(self: InFlightCall, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(InFlightCall, "__init__", init)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def test_a_call_in_a_thread(engine: StubEngine, orla: Orla, calls: list[weakref.ref[InFlightCall]]) -> None:
    left = []

    def node(state: MessagesState) -> Any:
        for _ in range(3):
            answer = chat(engine).invoke("hello")
        left.extend(each() for each in calls)
        return {"messages": [answer]}

    orla.wrap(StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile()).invoke(QUESTION)
    assert left[:-1] == [None, None]


async def test_a_call_in_a_task(engine: StubEngine, orla: Orla, calls: list[weakref.ref[InFlightCall]]) -> None:
    left = []

    async def node(state: MessagesState) -> Any:
        for _ in range(3):
            answer = await chat(engine).ainvoke("hello")
        left.extend(each() for each in calls)
        return {"messages": [answer]}

    graph = StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile()
    await orla.wrap(graph).ainvoke(QUESTION)
    assert left[:-1] == [None, None]


def test_a_raw_response_knows_how_long_it_took(engine: StubEngine, orla: Orla) -> None:
    took = []

    def node(state: MessagesState) -> Any:
        client = openai.OpenAI(base_url=engine.url, api_key="any")
        raw = client.chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": "hello"}]
        )
        took.append(raw.elapsed.total_seconds())
        return {"messages": []}

    orla.wrap(StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile()).invoke(QUESTION)
    assert 0 < took[0] < 60
