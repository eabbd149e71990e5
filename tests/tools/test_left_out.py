"""Tools whose early starts come to nothing, answer after answer: they are left out, with one warning."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import interrupt

from tests.tools.conftest import Lab
from tests.tools.planned_engine import Answer

HELLO = {"messages": [HumanMessage("Hello")]}
TWICE = (("look", {"x": 1}), ("look", {"x": 2}))

Act = Callable[[BaseTool, dict[str, Any]], str]


def looking(lab: Lab) -> BaseTool:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        return f"seen {x}"

    return look


def acting(lab: Lab, act: Act, *, loops: bool = False) -> StateGraph[Any]:
    """Return a graph whose own node does what the model asks for."""
    look = looking(lab)
    model = lab.model().bind_tools([look])

    def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def do(state: MessagesState) -> dict[str, Any]:
        asked = state["messages"][-1]
        assert isinstance(asked, AIMessage)
        return {
            "messages": [ToolMessage(act(look, call["args"]), tool_call_id=call["id"]) for call in asked.tool_calls]
        }

    graph = StateGraph(MessagesState)
    graph.add_node("think", think)
    graph.add_node("act", do)
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", lambda s: "act" if s["messages"][-1].tool_calls else "__end__")
    if loops:
        graph.add_edge("act", "think")
    return graph


def its_function(look: Any, args: dict[str, Any]) -> str:
    return str(look.func(**args))


def other_arguments(look: BaseTool, args: dict[str, Any]) -> str:
    return str(look.invoke({"x": args["x"] + 100}))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "not started early any more" in record.message]


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (its_function, "the node calls its function, not the tool, or does not call it"),
        (other_arguments, "the node calls it with other arguments"),
    ],
)
def test_a_tool_whose_starts_no_call_asks_for_is_left_out(
    lab: Lab, served: Callable[..., Any], caplog: pytest.LogCaptureFixture, act: Act, why: str
) -> None:
    caplog.set_level(logging.WARNING)
    lab.plan = [Answer(TWICE)]
    graph = served(acting(lab, act), tools_safe={"look"})
    for nth in range(5):
        lab.awaits = min(2 * (nth + 1), 6)
        graph.invoke(HELLO)
    assert (lab.early.started, lab.early.used, lab.early.dropped) == (6, 0, {"run_ended": 6})
    assert lab.early.left_out == {"unused": 1}
    assert 10 <= lab.runs["look"] <= 16, "twice in three runs, where the thread was in time, and then once"
    assert warned(caplog) == [
        "tool 'look' of node 'act' started early 6 times and none was used: "
        f"{why}; it is not started early any more"
    ]  # fmt: skip


def test_within_one_run_too(lab: Lab, served: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    lab.plan = [Answer((("look", {"x": at}),)) for at in range(5)]
    served(acting(lab, its_function, loops=True), tools_safe={"look"}).invoke(HELLO)
    assert (lab.early.dropped, lab.early.left_out) == ({"next_call": 3}, {"unused": 1})
    assert len(warned(caplog)) == 1


def test_a_use_begins_the_count_again(lab: Lab, served: Callable[..., Any]) -> None:
    lab.plan = [Answer((("look", {"x": 1}),))]
    acts = [its_function, its_function, lambda look, args: look.invoke(args)] * 2
    graph = served(acting(lab, lambda look, args: acts[lab.hidden["nth"]](look, args)), tools_safe={"look"})
    for nth in range(6):
        lab.hidden["nth"], lab.awaits = nth, nth + 1
        graph.invoke(HELLO)
    assert (lab.early.started, lab.early.dropped["run_ended"], lab.early.left_out) == (6, 4, {})


def _fails(look: Any, args: Any) -> str:
    raise ConnectionError("down")


def _asks(look: Any, args: Any) -> str:
    return str(interrupt("may it?"))


@pytest.mark.parametrize(
    ("act", "how"),
    [(_fails, {}), (_asks, {}), (its_function, {"interrupt_before": ["act"]}), (its_function, {"leaves": True})],
)
def test_runs_that_do_not_come_to_their_end_teach_nothing(
    lab: Lab, served: Callable[..., Any], act: Act, how: dict[str, Any]
) -> None:
    lab.plan = [Answer((("look", {"x": 1}),))]
    graph = served(acting(lab, act).compile(checkpointer=InMemorySaver()), tools_safe={"look"})
    for nth in range(5):
        lab.awaits, config = nth + 1, {"configurable": {"thread_id": str(nth)}}
        if how.get("leaves"):
            stream = graph.stream(HELLO, config)
            next(stream)
            stream.close()
        elif act is _fails:
            with pytest.raises(ConnectionError):
                graph.invoke(HELLO, config)
        else:
            graph.invoke(HELLO, config, **how)
    assert (lab.early.started, lab.early.dropped, lab.early.left_out) == (5, {"run_ended": 5}, {})


@pytest.mark.parametrize("mends", [False, True])
def test_a_tool_whose_starts_fail_answer_after_answer_is_left_out(
    lab: Lab, served: Callable[..., Any], caplog: pytest.LogCaptureFixture, mends: bool
) -> None:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        if mends and lab.hidden["nth"] == 2:
            return "seen"
        raise ValueError(f"no {x}")

    lab.plan = [Answer(TWICE)]
    model = lab.model().bind_tools([look])
    graph = StateGraph(MessagesState)
    graph.add_node("think", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([look], handle_tool_errors=True))
    graph.add_edge(START, "think")
    graph.add_edge("think", "tools")
    wrapped = served(graph.compile(), tools_safe={"look"})
    for nth in range(5):
        lab.hidden["nth"], lab.awaits = nth, min(2 * (nth + 1), 10 if mends else 6)
        wrapped.invoke(HELLO)
    if mends:
        assert (lab.early.started, lab.early.left_out) == (10, {})
        return
    assert lab.early.left_out == {"failing": 1}
    assert lab.early.started == 6, "of three answers, though the tool may have had its turn before a start began"
    (message,) = warned(caplog)
    assert re.match(
        r"tool 'look' of node 'tools' started early \d times in a row and ran again in its place", message
    )
    assert "at last because it raised ValueError('no " in message
