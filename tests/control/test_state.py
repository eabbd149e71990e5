"""What a process shows of itself, against what is so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from orla_lg import Orla
from orla_lg.control.state import Activity, state
from tests.conftest import at, chat
from tests.stub_engine import StubEngine


@pytest.fixture
def slotted() -> Iterator[StubEngine]:
    with StubEngine(slots=4) as running:
        yield running


def test_an_interrupted_thread_waits_for_a_human_on_engines_with_slots_too(
    slotted: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    orla = make_orla(at(slotted, engine="llamacpp"), mapper={"*": "main"})
    llm = chat(slotted)

    def draft(messages: MessagesState) -> MessagesState:
        return {"messages": [llm.invoke(messages["messages"])]}

    def asks(messages: MessagesState) -> MessagesState:
        interrupt("go on?")
        return {"messages": []}

    made = StateGraph(MessagesState).add_node("draft", draft).add_node("asks", asks)
    app = orla.wrap(made.add_edge(START, "draft").add_edge("draft", "asks").compile(checkpointer=InMemorySaver()))
    waits, done = ({"configurable": {"thread_id": name}} for name in ("waits", "done"))
    for config in (waits, done):
        app.invoke({"messages": [("user", "hi")]}, config)

    def shown() -> dict[str, Activity]:
        return {each.workflow: each.state for each in state(orla.core.serving).backends["main"].kv.workflows}

    assert shown() == {"waits": Activity.HUMAN, "done": Activity.HUMAN}
    app.invoke(Command(resume="yes"), done)
    assert shown() == {"waits": Activity.HUMAN, "done": Activity.IDLE}
