"""What an Agent Server serves in these tests: graphs that are wrapped when their module is imported."""

from __future__ import annotations

import os
from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

from orla_lg import Orla

orla = Orla.remote(records_file=os.environ["RECORDS"])  # ORLA_SERVER says where

model = ChatOpenAI(model="auto", api_key="none", base_url="http://127.0.0.1:9/v1", max_retries=0, max_tokens=20)  # type: ignore[arg-type, call-arg]


async def ask(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await model.ainvoke(state["messages"])]}


def ask_sync(state: MessagesState) -> dict[str, Any]:
    return {"messages": [model.invoke(state["messages"])]}


def built(node: Any) -> Any:
    builder = StateGraph(MessagesState)
    builder.add_node("ask", node)
    builder.add_edge(START, "ask")
    builder.add_edge("ask", END)
    return orla.wrap(builder.compile())


asks, asks_sync = built(ask), built(ask_sync)
