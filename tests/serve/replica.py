"""One process of an application with wrapped graphs: it reads what to do as lines of JSON, and answers line by line.

``{"model": "wide", "calls": 12, "say": "hello", "config": {…}}`` runs so many graphs at once, each with one call. The
first argument is the server's URL, or a configuration's file for a core of the process's own (the control).
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

from orla_lg import Orla, OrlaError


def graph_of(orla: Orla, model: str) -> Any:
    llm = ChatOpenAI(model=model, api_key="none", base_url="http://127.0.0.1:9/v1", max_retries=0, max_tokens=4)  # type: ignore[arg-type, call-arg]

    async def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    builder.add_edge("ask", END)
    return orla.wrap(builder)


async def done(orla: Orla, graphs: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
    """Run graphs, and return how it went."""
    graph = graphs.setdefault(order["model"], graph_of(orla, order["model"]))

    async def one(number: int) -> str:
        messages = [("system", order["system"])] if "system" in order else []
        messages.append(("user", f"{order['say']} {number}"))
        try:
            await graph.ainvoke({"messages": messages}, order.get("config"))
        except OrlaError as error:
            return type(error).__name__
        return "well"

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(number)) for number in range(order["calls"])]
    return {"said": [each.result() for each in running]}


async def main(where: str) -> None:
    loop = asyncio.get_running_loop()
    with Orla.remote(where) if "://" in where else Orla.from_config(where) as orla:
        graphs: dict[str, Any] = {}
        print(json.dumps({"ready": True}), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(json.dumps(await done(orla, graphs, json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
