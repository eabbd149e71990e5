"""Policies and mappers of a user's own that fail: the error names them, the call, and what they raised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Assignment, BackendView, Call, ChatOrla, MappingError, Orla, PolicyError, Queued
from tests.conftest import at, chat
from tests.stub_engine import StubEngine

MakeOrla = Callable[..., Orla]


class Alphabetical:
    """Orders calls by their tenant, which not all have."""

    def key(self, head: Queued, now: float) -> tuple[Any, ...]:
        if head.call.hints.tenant is None:
            raise ValueError("a call without a tenant")
        return (head.call.hints.tenant,)


class Cheapest:
    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment:
        return Assignment(min(backends, key=lambda each: each.price).name)  # type: ignore[attr-defined]


class Asking:
    async def amap(self, call: Call, backends: Sequence[BackendView]) -> Assignment:
        raise LookupError("no such table")


def in_a_graph(orla: Orla, engine: StubEngine) -> None:
    llm = chat(engine)

    def reply(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    builder = StateGraph(MessagesState).add_node("reply", reply).add_edge(START, "reply")
    orla.wrap(builder).invoke({"messages": [("user", "Hello!")]})


def test_a_policy_that_raises_is_named_with_its_call(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, policy=Alphabetical())
    said = (
        r"^request policy Alphabetical cannot order call \S+ of stage 'reply' on backend 'main': ValueError: a call"
    )
    with pytest.raises(PolicyError, match=said) as raised:
        in_a_graph(orla, engine)
    assert isinstance(raised.value.__cause__, ValueError)
    assert orla.records()[-1].error.startswith("PolicyError: request policy Alphabetical")
    assert ChatOrla(orla=orla, model="main").invoke("Hello!", tenant="acme").text, "other calls go on"


@pytest.mark.parametrize(
    ("mapper", "said"),
    [
        (Cheapest(), "stage 'reply': mapper Cheapest failed: AttributeError: 'BackendView' object has no attribute"),
        (Asking(), "stage 'reply': mapper Asking failed: LookupError: no such table"),
        ({"reply": Asking(), "*": "main"}, "stage 'reply': mapper Asking failed: LookupError"),
    ],
)
def test_a_mapper_that_raises_is_named_with_its_stage(
    engine: StubEngine, make_orla: MakeOrla, mapper: Any, said: str
) -> None:
    with pytest.raises(MappingError, match=f"^{said}") as raised:
        in_a_graph(make_orla(at(engine), mapper=mapper), engine)
    assert isinstance(raised.value.__cause__, AttributeError | LookupError)
