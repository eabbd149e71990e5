"""A process of wrapped graphs, with a core of its own and with a link to one: it does the blocks that it reads.

A line on its standard input is a block: the arm, the number of its calls, and how many at once. The answer is a line
too: each call's wait for its grant, and its whole time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from bench.serve.link import LINK, LOCAL
from bench.serve.load import PROMPT
from orla_lg import Backend, Orla
from tests.scripted_engine import MODEL

BOUND = 64
"""More than are ever at once, so that no call waits for another one."""


def graph(orla: Orla, engine: str) -> Any:
    """Return a graph of one node whose call goes through *orla*."""
    model = ChatOpenAI(model=MODEL, base_url=engine, api_key="any", max_retries=0)

    async def node(state: MessagesState) -> Any:
        return {"messages": [await model.ainvoke(state["messages"])]}

    return orla.wrap(StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile())


async def block(orla: Orla, graph: Any, calls: int, at_once: int) -> dict[str, Any]:
    """Make a block of calls; return what each took, in milliseconds."""
    left, taken_ms = iter(range(calls)), list[float]()

    async def caller() -> None:
        for _ in left:
            begin_s = time.perf_counter()
            await graph.ainvoke({"messages": PROMPT})
            taken_ms.append((time.perf_counter() - begin_s) * 1e3)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(caller())
    return {"wait_ms": [each.queue_wait_s * 1e3 for each in orla.records()[-calls:]], "taken_ms": taken_ms}


async def main(engine: str, server: str) -> None:
    local = Orla([Backend("main", engine, model=MODEL, engine="openai", max_concurrency=BOUND)], {"*": "main"})
    with local, Orla.remote(server) as linked:
        arms = {LOCAL: (local, graph(local, engine)), LINK: (linked, graph(linked, engine))}
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            arm, calls, at_once = json.loads(line)
            print(json.dumps(await block(*arms[arm], calls, at_once)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
