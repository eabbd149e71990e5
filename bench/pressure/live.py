"""The arms on a real engine: each session is a run of one LangGraph graph.

What user and tools say comes from the load and is the same in every arm. The answers in a history are those that
the engine gave, as in a real agent, so that what it generated is found in its cache; of fixed length, they differ in
words only. Nothing here knows of orla_lg but the one line that wraps the graph.
"""

from __future__ import annotations

import asyncio
import operator
import time
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from pydantic import SecretStr

from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.engines import VLLM
from bench.pressure.arms import Arm
from bench.pressure.unplugged import plugin
from bench.pressure.workflows import CALLS, Load
from orla_lg import Backend, Orla

WARM_TOKENS = 8
CONNECT_PATIENCE_S = 30.0
"""The first probe asks the engine for answers of its own, a slow thing in an engine that is new."""


class State(TypedDict):
    session: int
    arrived_s: float
    history: Annotated[list[AnyMessage], operator.add]
    seen: Annotated[list[CallSeen], operator.add]


class LiveTurns:
    """Runs arms on one engine."""

    def __init__(self, engine: VLLM) -> None:
        self._engine = engine
        # No retries: a call that failed is no figure. Streaming shows the first token.
        self._model = ChatOpenAI(
            model=engine.model,
            base_url=engine.url,
            api_key=SecretStr("any"),
            timeout=600,
            max_retries=0,
            temperature=0,
            stream_usage=True,
        )

    @property
    def url(self) -> str:
        return self._engine.url

    async def turn(self, arm: Arm, load: Load) -> Turn:
        """Run one arm from an empty cache."""
        graph = self.graph(arm, load)
        if not arm.wrapped:
            return await self._measured(graph, arm, load)
        if arm.plugin and not self._engine.has_plugin:
            raise SystemExit(f"{self.url} was started without the orla_lg plugin, which the arm {arm.name} needs")
        backend = Backend("engine", self._engine.url, self._engine.model, engine="vllm")
        with plugin(seen=arm.plugin), Orla([backend], admission=arm.admission) as orla:
            if faults := [str(fault) for fault in orla.connect(CONNECT_PATIENCE_S).values() if fault is not None]:
                raise SystemExit("; ".join(faults))
            return await self._measured(orla.wrap(graph), arm, load)

    async def _measured(self, graph: Any, arm: Arm, load: Load) -> Turn:
        for _ in range(2):  # the first calls after a pause are slower
            await self._model.ainvoke("hello", max_tokens=WARM_TOKENS)
        self._engine.empty_cache()
        made = Turn(arm.name, load.seed, load.shared_tokens, [], [])
        door, begin_s = arm.door(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(len(load.sessions)):
                group.create_task(_session(graph, load, number, door, begin_s, made))
        return made

    def graph(self, arm: Arm, load: Load) -> Any:
        """Return an agent with a tool; not wrapped."""

        async def agent(state: State) -> dict[str, Any]:
            session, number = state["session"], len(state["seen"])
            called_s = time.perf_counter() if number else state["arrived_s"]  # at a door, too, its first call waits
            extra: dict[str, Any] = {"ignore_eos": True, "min_tokens": load.answer_tokens}
            if arm.by_arrival:
                extra["priority"] = session
            answer, first_s = AIMessageChunk(""), 0.0
            stream = self._model.astream(state["history"], max_tokens=load.answer_tokens, extra_body=extra)
            async for chunk in stream:
                assert isinstance(chunk, AIMessageChunk)
                if chunk.content and not first_s:
                    first_s = time.perf_counter()
                answer += chunk
            ended_s = time.perf_counter()
            seen = _seen(session, number, answer, (called_s, first_s or ended_s, ended_s))
            return {"history": [AIMessage(answer.content)], "seen": [seen]}

        async def tool(state: State) -> dict[str, Any]:
            session, number = load.sessions[state["session"]], len(state["seen"])
            await asyncio.sleep(session.waits_s[number - 1])
            return {"history": [HumanMessage(session.said[number])]}

        def next_node(state: State) -> str:
            return END if len(state["seen"]) == CALLS else "tool"

        graph = StateGraph(State)
        graph.add_node("agent", agent)
        graph.add_node("tool", tool)
        graph.add_edge(START, "agent")
        graph.add_conditional_edges("agent", next_node, ["tool", END])
        graph.add_edge("tool", "agent")
        return graph.compile()


def _seen(session: int, number: int, answer: AIMessageChunk, times_s: tuple[float, float, float]) -> CallSeen:
    usage = answer.usage_metadata
    if usage is None:
        raise SystemExit("the engine does not count tokens in its streams")
    cached = usage.get("input_token_details", {}).get("cache_read", 0)
    return CallSeen(session, number, *times_s, usage["input_tokens"], cached, usage["output_tokens"])


async def _session(
    graph: Any, load: Load, number: int, door: AbstractAsyncContextManager[object], begin_s: float, made: Turn
) -> None:
    session = load.sessions[number]
    await asyncio.sleep(session.begin_s)
    arrived_s = time.perf_counter()
    system, first = load.opening(session)
    history = [SystemMessage(system["content"]), HumanMessage(first["content"])]
    async with door:
        ended = await graph.ainvoke({"session": number, "arrived_s": arrived_s, "history": history, "seen": []})
    made.jobs.append(JobSeen(number, arrived_s - begin_s, time.perf_counter() - begin_s))
    made.calls.extend(call.since(begin_s) for call in ended["seen"])
