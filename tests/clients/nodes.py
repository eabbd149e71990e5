"""Code that runs in the node ``ask`` of a wrapped graph."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla


def inside(orla: Orla, body: Callable[[], Any], config: Any = None, **wrap_with: Any) -> Any:
    """Run *body* in the node and return its result."""
    results = []

    def ask(state: MessagesState) -> Any:
        results.append(body())

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    orla.wrap(graph, **wrap_with).invoke({"messages": []}, config)
    return results[0]


def ainside(orla: Orla, body: Callable[[], Awaitable[Any]], **wrap_with: Any) -> Any:
    """``inside`` for a coroutine."""
    results = []

    async def ask(state: MessagesState) -> Any:
        results.append(await body())

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    asyncio.run(orla.wrap(graph, **wrap_with).ainvoke({"messages": []}))
    return results[0]
