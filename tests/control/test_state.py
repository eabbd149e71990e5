"""What a process shows of itself, against what is so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from orla_lg import Orla
from orla_lg.control.state import state
from orla_lg.core.memory.events import Doing
from orla_lg.core.record import CallEvent
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

    def shown() -> dict[str, Doing]:
        return {each.workflow: each.state for each in state(orla.core.serving).backends["main"].kv.workflows}

    assert shown() == {"waits": Doing.HUMAN, "done": Doing.HUMAN}
    app.invoke(Command(resume="yes"), done)
    assert shown() == {"waits": Doing.HUMAN, "done": Doing.IDLE}


def test_what_a_saver_tells_is_timed_by_the_cores_clock(slotted: StubEngine, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(at(slotted))
    heard: list[CallEvent] = []
    orla.subscribe(heard.append)
    orla.core.serving.clock = lambda: 12.5
    orla.signals.stages_next("thread", "", ["next"])
    assert [event.at_s for event in heard] == [12.5]
