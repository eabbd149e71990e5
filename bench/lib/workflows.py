"""Agents as a LangGraph graph (say something, ask the model, wait for a tool), arrivals, and one turn of an arm."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.client import ask, connected, model_at, warm, wrapped
from orla_lg import Backend, Orla


@dataclass(frozen=True)
class Session:
    """One workflow: when it arrives, what user or tools say before each call, how long each tool takes."""

    begin_s: float
    said: tuple[str, ...] = field(repr=False)
    waits_s: tuple[float, ...]


class State(TypedDict):
    number: int
    arrived_s: float
    history: Annotated[list[AnyMessage], operator.add]
    seen: Annotated[list[CallSeen], operator.add]


async def sleep(number: int, wait_s: float) -> None:
    """Wait as for a tool."""
    await asyncio.sleep(wait_s)


def agent(
    sessions: Sequence[Session], model: Any, *, system: str = "",
    tool: Callable[[int, float], Awaitable[Any]] = sleep, extra: Callable[[int], dict[str, Any]] = lambda number: {},
    tick: Callable[[], None] = lambda: None,
) -> StateGraph[Any, Any, Any, Any]:  # fmt: skip
    """Return the graph; answers in a history are those that the engine gave, as in a real agent.

    *tool* is awaited with a session's number and its wait, *extra* gives a session's options for the model.
    """

    async def agent(state: State) -> dict[str, Any]:
        number, calls = state["number"], len(state["seen"])
        fresh: list[AnyMessage] = [SystemMessage(system)] if system and not calls else []
        fresh.append(HumanMessage(sessions[number].said[calls]))
        called_s = None if calls else state["arrived_s"]  # where sessions wait to be let in, the first call waits
        history = [*state["history"], *fresh]
        seen, answer = await ask(model, history, session=number, number=calls, called_s=called_s, **extra(number))
        tick()
        return {"history": [*fresh, AIMessage(answer)], "seen": [seen]}

    async def wait(state: State) -> dict[str, Any]:
        await tool(state["number"], sessions[state["number"]].waits_s[len(state["seen"]) - 1])
        return {}

    def waits(state: State) -> str:
        return "tool" if len(state["seen"]) <= len(sessions[state["number"]].waits_s) else END

    def goes_on(state: State) -> str:
        return "agent" if len(state["seen"]) < len(sessions[state["number"]].said) else END

    graph = StateGraph(State).add_node("agent", agent).add_node("tool", wait).add_edge(START, "agent")
    graph.add_conditional_edges("agent", waits, ["tool", END])
    return graph.add_conditional_edges("tool", goes_on, ["agent", END])


async def play(
    graph: Any, sessions: Sequence[Session], *, door: AbstractAsyncContextManager[Any] | None = None,
    threads: bool = False,
) -> tuple[list[CallSeen], list[JobSeen]]:  # fmt: skip
    """Let all sessions arrive at their times and see them end; times count from now."""
    calls, jobs, begin_s = list[CallSeen](), list[JobSeen](), time.perf_counter()

    async def one(number: int) -> None:
        await asyncio.sleep(sessions[number].begin_s)
        arrived_s = time.perf_counter()
        config: dict[str, Any] = {"recursion_limit": 1000}
        if threads:
            config["configurable"] = {"thread_id": f"session-{number}"}
        async with door or nullcontext():
            state = {"number": number, "arrived_s": arrived_s, "history": [], "seen": []}
            ended = await graph.ainvoke(state, config)
        jobs.append(JobSeen(number, arrived_s - begin_s, time.perf_counter() - begin_s))
        calls.extend(call.since(begin_s) for call in ended["seen"])

    async with asyncio.TaskGroup() as group:
        for number in range(len(sessions)):
            group.create_task(one(number))
    return calls, jobs


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve a graph."""

    name: str
    orla: Mapping[str, Any] | None = None
    """What the ``Orla`` around the graph is given beside its backends; ``None``: the graph stays bare."""


async def turn_of(
    arm: Any, engine: Any, backend: Backend, sessions: Sequence[Any], graph: Callable[[ChatOpenAI], Any], *,
    seed: int, shared: int = 0, place: str = "", mapper: Mapping[str, Any] | None = None, fresh: bool = False,
    showing: Callable[[Orla | None], dict[str, Any]] = lambda orla: {}, **how: Any,
) -> Turn:  # fmt: skip
    """Play sessions on an engine in an arm's way, from an empty cache.

    A *fresh* engine has just been started: it is neither warmed nor emptied. *showing* says what only this experiment
    wants to know of the arm's ``Orla``; for *how* see ``play``.
    """
    async with model_at(engine.url, engine.model) as model:
        built = graph(model)
        with connected([backend], mapper, wrapped=arm.orla is not None, **(arm.orla or {})) as orla:
            if not fresh:
                await warm(model)
                engine.empty_cache()
            calls, jobs = await play(wrapped(orla, built), sessions, **how)
            return Turn(arm.name, seed, shared, calls, jobs, place=place, more=showing(orla))
