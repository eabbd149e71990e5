"""What says why no tool began early: counts by reason, and the mark of a tool in a graph's plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import StructuredTool, tool
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import plan
from orla_lg.openai_api.agreement import engine_of
from tests.tools.conftest import PATIENCE_S, Lab
from tests.tools.planned_engine import Answer

HELLO = {"messages": [HumanMessage("Hello")]}


@tool
def look(x: int) -> str:
    """Look at x."""
    return f"seen {x}"


def other(name: str = "other") -> StructuredTool:
    return StructuredTool.from_function(lambda x: str(x), name=name, description=name)


def differ(lab: Lab) -> None:
    assert lab.orla is not None
    assert lab.orla.connect(PATIENCE_S) == {"main": None}, "else it becomes another engine once it is known"
    core = lab.orla.core
    engine = engine_of(core.serving.schedulers["main"].health.probe)
    core.clients["main"].agreement.begins(engine)
    core.clients["main"].agreement.conclude(engine, ["content is 'a' in one piece, 'b' streamed"])


@pytest.mark.parametrize(
    ("backend", "streams", "why"),
    [
        ({"assemble": True}, False, None),
        ({"assemble": None}, False, "pending"),
        ({"assemble": None, "differs": True}, False, "different"),
        ({"assemble": False}, False, "not_assembled"),
        ({"early_tools": False, "assemble": None}, False, "off"),
        ({"early_tools": False}, True, "off"),
        ({"assemble": False}, True, None),
    ],
)
def test_what_comes_late_is_counted_by_reason(
    lab: Lab, served: Callable[..., Any], backend: dict[str, Any], streams: bool, why: str | None
) -> None:
    lab.plan = [Answer((("look", {"x": 1}),))]
    backend, differs = {**backend}, backend.get("differs")
    backend.pop("differs", None)
    graph = served(create_agent(lab.model(streaming=streams), [look]), backend=backend, tools_safe={"look"})
    if differs:
        differ(lab)
    graph.invoke(HELLO)
    assert lab.early.offered == 2
    if why == "pending":  # for the first call; the pair may be there for the second
        assert lab.early.late[why] >= 1
    else:
        assert lab.early.late == ({} if why is None else {why: 2})


def test_what_offers_no_safe_tool_is_not_counted(lab: Lab, served: Callable[..., Any]) -> None:
    lab.plan = [Answer((("other", {"x": 1}),))]
    served(create_agent(lab.model(), [other()]), tools_safe={"look"}).invoke(HELLO)
    assert (lab.early.offered, lab.early.late) == (0, {})


def test_a_plan_marks_the_tools_that_may_start_early(lab: Lab, served: Callable[..., Any]) -> None:
    graph = StateGraph(MessagesState)
    graph.add_node("inner", create_agent(lab.model(), [look, other(), other("third")], name="inner"))
    graph.add_edge(START, "inner")
    compiled = graph.compile()
    wrapped = served(compiled, tools_safe={"look"})
    assert lab.orla is not None
    tree = lab.orla.stages(wrapped)
    assert [each.name for each in tree.walk() if each.may_begin_early] == ["look"]
    assert "look (tool, may start early)" in str(tree) and "other, third (tools)" in str(tree)
    assert '"may_begin_early": True'.replace('"', "'") in str(tree.as_dict())
    assert "may start early" not in str(lab.orla.stages(compiled))
    shown, _ = plan._read(wrapped, None)
    assert "may start early" in str(shown)
