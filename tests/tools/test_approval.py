"""What is approved before it runs never starts early: not at first, and not once its node was seen to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AutoModeMiddleware, HumanInTheLoopMiddleware, ToolRetryMiddleware
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command

from orla_lg import Backend, Orla
from orla_lg.graph.tools import declared
from orla_lg.graph.tools.early.approval import approved_by, approved_in
from orla_lg.graph.tools.early.running import EARLY
from tests.tools.planned_engine import MODEL, Answer, PlannedEngine

PLAN = [Answer(calls=[("delete", {"key": 1})]), Answer(calls=[("delete", {"key": 2})]), Answer(text="done")]
YES: Any = {"decisions": [{"type": "approve"}]}

early: list[bool] = []


@tool
def delete(key: int) -> str:
    """Delete something."""
    early.append(EARLY.get() is not None)
    return "gone"


def with_a_human(llm: ChatOpenAI) -> Any:
    asks = HumanInTheLoopMiddleware(interrupt_on={"delete": True})
    return create_agent(llm, [delete], middleware=[asks], checkpointer=InMemorySaver())


def with_an_agent_inside(llm: ChatOpenAI) -> Any:
    asks = HumanInTheLoopMiddleware(interrupt_on={"delete": True})
    inner = create_agent(llm, [delete], middleware=[asks])
    graph = StateGraph(MessagesState).add_node("agent", inner).add_edge(START, "agent")
    return graph.compile(checkpointer=InMemorySaver())


def stopped(**where: Any) -> Callable[[ChatOpenAI], Any]:
    def build(llm: ChatOpenAI) -> Any:
        bound = llm.bind_tools([delete])
        graph = StateGraph(MessagesState)
        graph.add_node("model", lambda state: {"messages": [bound.invoke(state["messages"])]})
        graph.add_node("tools", ToolNode([delete])).add_edge(START, "model").add_edge("tools", "model")
        graph.add_conditional_edges("model", tools_condition)
        return graph.compile(checkpointer=InMemorySaver(), **where)

    return build


@pytest.mark.parametrize(
    ("build", "goes_on"),
    [
        (with_a_human, Command(resume=YES)),
        (with_an_agent_inside, Command(resume=YES)),
        (stopped(interrupt_before=["tools"]), None),
        (stopped(interrupt_after=["model"]), None),
    ],
    ids=["middleware", "inside", "before", "after"],
)
def test_a_tool_that_is_approved_is_not_learned_from_its_runs(
    build: Callable[[ChatOpenAI], Any], goes_on: Any
) -> None:
    early.clear()
    with PlannedEngine(PLAN) as engine, Orla([Backend("main", engine.url, model=MODEL)], {"*": "main"}) as orla:
        llm = ChatOpenAI(base_url=engine.url, model=MODEL, api_key="none", max_retries=0)
        graph = orla.wrap(build(llm), tools_safe={"delete"})
        config: Any = {"configurable": {"thread_id": "1"}}
        graph.invoke({"messages": [("user", "go")]}, config)
        for _ in range(2):
            graph.invoke(goes_on, config)
        assert graph.get_state(config).values["messages"][-1].text == "done" or goes_on is None
        assert early == [False, False]
        assert orla.statistics().early_tools.started == 0


def guarded(middleware: Sequence[Any]) -> Any:
    llm = ChatOpenAI(base_url="http://127.0.0.1:9/v1", model=MODEL, api_key="none")
    return create_agent(llm, [delete, other], middleware=middleware)


@tool
def other() -> str:
    """Do nothing."""
    return ""


@pytest.mark.parametrize("named", ["delete", delete])
def test_what_a_model_approves_is_found_wherever_its_middleware_stands(named: str | BaseTool) -> None:
    auto = AutoModeMiddleware(tools=[named], classifier=None)  # type: ignore[arg-type]
    retry = ToolRetryMiddleware()
    for middleware in ([auto], [retry, auto], [auto, retry]):
        graph = guarded(middleware)
        assert approved_in(graph) == {"delete"}
        assert approved_in(StateGraph(MessagesState).add_node(graph).add_edge(START, "LangGraph").compile()) == {
            "delete"
        }
    assert approved_by([each.bound for each in guarded([retry]).nodes.values()]) == set()


def test_what_a_tool_needs_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = list[str]()

    def look(tool: BaseTool) -> str:
        looked.append(tool.name)
        return "its argument 'state' is injected where it runs"

    monkeypatch.setattr(declared, "needs_its_place", look)
    safe = declared.SafeTools(declared.DeclaredTools(frozenset({"delete"})))
    for _ in range(3):
        safe.used(delete, "tools:1")
    assert looked == ["delete"] and not safe.names
