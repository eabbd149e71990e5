"""The graph and its arms, one measured run, and the lanes: each arm runs the same requests, one after the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
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
WARMING = 2
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
    url: str, pace: Pace, scale: float, requests: Sequence[Request], *, serial: bool, arms: Sequence[str],
    tick: Callable[[], None],
) -> list[Run]:  # fmt: skip
    """Run all requests in all arms. Arms run at the same time, each one request at a time before a cache of its own.

    The first ``WARMING`` requests do not count: they warm connections and code, and teach what is learned.
    """
    fast, runs = pace.times(scale), list[Run]()
    tools_s = dict(item for request in requests for item in request.tools_s.items())

    def waits(q: str) -> float:
        return tools_s[q.split()[0]] / scale

    async def lane(arm: str, graph: Any) -> None:
        for request in requests:
            found = Times(*(scale * took_s for took_s in await run(graph, request)))
            if request.number >= WARMING:
                runs.append(Run(arm, request.number, found, law(request, pace, way_of(arm, serial=serial))))
            tick()

    async with AsyncExitStack() as stack:
        graphs = {}
        for arm in arms:
            where = f"{url}/{fast.tokens_s:g}/{fast.prefill_s:g}/{arm.replace(' ', '-')}-{serial:d}/v1"
            backend, given = Backend(BACKEND, where, MODEL, engine="vllm"), ARMS[arm]
            model = await stack.enter_async_context(model_at(where, MODEL))
            orla = stack.enter_context(connected([backend], {"*": BACKEND}, wrapped=given is not None))
            graph = graph_of(model, waits, requests[0].sizes.result, serial=serial)
            graphs[arm] = graph if orla is None else orla.wrap(graph, **given or {})
        async with asyncio.TaskGroup() as group:
            for arm, graph in graphs.items():
                group.create_task(lane(arm, graph))
    return runs
