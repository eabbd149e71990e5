"""The graph and its arms, one measured run, and the lanes in which each arm runs the same requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any, NamedTuple

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import Field, create_model

from bench.lib.client import connected, model_at
from bench.tools.engine import TOOL
from bench.tools.law import Pace, Request, Times, Way, filled, law
from orla_lg import Backend
from tests.scripted_engine import MODEL

BACKEND = "engine"
BARE = "bare"
NUMBER = ContextVar("NUMBER", default=0)
"""Of the request that runs."""
EARLY = {"tools_safe": {TOOL}}
SPLIT = {"split_prompts": True}
ARMS: dict[str, Mapping[str, Any] | None] = {
    BARE: None, "wrapped": {}, "early": EARLY, "split": SPLIT, "both": EARLY | SPLIT,
}  # fmt: skip
"""What ``wrap`` is given; ``None``: the graph stays bare."""


def way_of(arm: str, *, serial: bool) -> Way:
    given = ARMS[arm] or {}
    return Way(serial, "tools_safe" in given, "split_prompts" in given)


class Run(NamedTuple):
    """One request in an arm, as measured, and as the law has it; in the seconds of an engine at its stated pace."""

    arm: str
    seed: int
    found: Times
    law: Times


Waits = Callable[[str], float]
"""How long the tool takes that is given this argument."""


def graph_of(
    model: Any, waits: Waits, result_tokens: int, *, serial: bool, longest: int | None = None, **choice: Any
) -> Any:
    """Return an agent whose tools run in a ``ToolNode``, or one after the other in a node of its own.

    *longest* bounds the characters of a tool's argument; *choice* is how tools are offered.
    """

    @tool(TOOL, args_schema=create_model(TOOL, q=(str, Field(max_length=longest))))
    async def look_up(q: str) -> str:
        """Look something up."""
        await asyncio.sleep(waits(q))
        return filled(f"{q[:16]} found: ", result_tokens)

    with_tools = model.bind_tools([look_up], **choice)

    async def agent(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await with_tools.ainvoke(state["messages"])]}

    async def one_by_one(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await look_up.ainvoke(call) for call in state["messages"][-1].tool_calls]}  # type: ignore[union-attr]

    graph = StateGraph(MessagesState).add_node("agent", agent).add_edge(START, "agent").add_edge("tools", "agent")
    graph.add_node("tools", one_by_one if serial else ToolNode([look_up]))
    return graph.add_conditional_edges("agent", tools_condition).compile()


async def run(graph: Any, request: Request) -> Times:
    """Run the graph once; the final answer says when its first token was there."""
    NUMBER.set(request.number)
    begin_s = time.monotonic()
    ended = await graph.ainvoke({"messages": [HumanMessage(request.text)]})
    end_s = time.monotonic()
    return Times(float(ended["messages"][-1].content.split()[0]) - begin_s, end_s - begin_s)


async def measure(
    url: str, pace: Pace, scale: float, requests: Sequence[Request], *, serial: bool, arms: Sequence[str], lanes: int,
    tick: Callable[[], None],
) -> list[Run]:  # fmt: skip
    """Run all requests in all arms at the same time, each arm in so many lanes.

    A lane runs one request at a time, on an engine of its own; the lanes of an arm share what is learned. Each runs
    one before that does not count: it warms connections and code, and shows where tools run.
    """
    fast, runs = pace.times(scale), list[Run]()
    firsts = [Request(len(requests) + lane, ((1.0, 0.5),), requests[0].sizes) for lane in range(lanes)]
    tools_s = {name: tool_s for request in (*requests, *firsts) for name, tool_s in request.tools_s.items()}

    def waits(q: str) -> float:
        return tools_s[q.split()[0]] / scale

    async def lane(arm: str, graph: Any, first: Request, left: Iterator[Request]) -> None:
        await run(graph, first)
        for request in left:
            found = Times(*(scale * took_s for took_s in await run(graph, request)))
            runs.append(Run(arm, request.number, found, law(request, pace, way_of(arm, serial=serial))))
            tick()

    ready = list[Coroutine[Any, Any, None]]()
    async with AsyncExitStack() as stack:
        for arm in arms:
            names, given, left = [f"engine{n}" for n in range(lanes)], ARMS[arm], iter(requests)
            where = {name: f"{url}/{fast.tokens_s:g}/{fast.prefill_s:g}/{arm}-{serial:d}-{name}/v1" for name in names}
            backends = [Backend(name, where[name], MODEL, engine="vllm", assemble=True) for name in names]
            begun = connected(backends, {"*": names[0]}, wrapped=given is not None)
            orla = await asyncio.to_thread(stack.enter_context, begun)  # beside lanes of another kind of node
            for name, first in zip(names, firsts, strict=True):
                model = await stack.enter_async_context(model_at(where[name], MODEL))
                graph = graph_of(model, waits, first.sizes.result, serial=serial)
                graph = graph if orla is None else orla.wrap(graph, mapper={"*": name}, **given or {})
                ready.append(lane(arm, graph, first, left))
        async with asyncio.TaskGroup() as group:
            for each in ready:
                group.create_task(each)
    return runs
