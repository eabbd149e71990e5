"""A graph with an agent in a node, and another agent in one of its tools: which stages are there?

    orla-lg plan examples.stages:graph

shows them as a tree, without any engine. ``create_agent`` needs the package ``langchain``.
"""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Limit, Limits, Orla

llm = ChatOpenAI(model="light", base_url="http://127.0.0.1:8001/v1", api_key="none", max_tokens=200)  # type: ignore[arg-type]


@tool
def look_up(order: str) -> str:
    """Return what is known of an order."""
    return f"order {order}: shipped on Monday"


expert = create_agent(llm, [look_up], name="expert")


@tool
def ask_expert(question: str) -> str:
    """Ask a specialist, with the question in one sentence."""
    return str(expert.invoke({"messages": [("user", question)]})["messages"][-1].text)


def triage(state: MessagesState) -> dict[str, Any]:
    """Say what the customer wants, in a word."""
    return {"messages": [llm.invoke(state["messages"])]}


builder = StateGraph(MessagesState)
builder.add_node("triage", triage)
builder.add_node("support", create_agent(llm, [look_up, ask_expert], name="support"))
builder.add_edge(START, "triage").add_edge("triage", "support")

orla = Orla(
    [Backend("light", "http://127.0.0.1:8001/v1"), Backend("heavy", "http://127.0.0.1:8002/v1")],
    mapper={"triage": "light", "support": "heavy", "expert": "light"},
    limits=Limits(stages={"support": Limit(calls=20, per_s=60)}),
)
graph = orla.wrap(builder.compile(name="desk"))
