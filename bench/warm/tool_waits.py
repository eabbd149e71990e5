"""Tool waits: workflows ask, wait for a tool that takes seconds, and ask again, while others push their cache out."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, StateGraph

from bench.cache.engines import Engine
from bench.lib.calls import CallSeen
from bench.warm.arms import Arm, Measured, ask, model_at, orla_of, warm_ups_of
from bench.warm.engines import BACKEND, Place, backend_at
from bench.warm.texts import job_file, text

SITUATION = "tool waits"
ANSWER_TOKENS = 16
GROW_TOKENS = 50


@dataclass(frozen=True, slots=True)
class Shape:
    """The load: as many workflows as two places hold, and as many again."""

    workflows: int = 4
    calls: int = 5
    wait_s: float = 12.0
    """Of the tool, on the mean; a quarter more or less."""


@dataclass(frozen=True, slots=True)
class Job:
    """A workflow: when it arrives, what it says before each call, and how long its tool takes after it."""

    begin_s: float
    said: tuple[str, ...] = field(repr=False)
    waits_s: tuple[float, ...]


def jobs_of(shape: Shape, tokens: int, seed: int) -> list[Job]:
    """Make up the jobs of a round; they arrive evenly over one wait."""
    dice, made = Random(seed), []
    for number in range(shape.workflows):
        first = job_file(100 * seed + number, dice, round(tokens * dice.uniform(0.9, 1.1)))
        later = [text(dice, GROW_TOKENS) for _ in range(shape.calls - 1)]
        waits_s = tuple(shape.wait_s * dice.uniform(0.75, 1.25) for _ in range(shape.calls))
        made.append(Job(number * shape.wait_s / shape.workflows, (first, *later), waits_s))
    return made


@tool
async def look_up(job: int, seconds: float) -> str:
    """Look a job up in the yard's papers, which takes its time."""
    await asyncio.sleep(seconds)
    return f"job {job}: found"


class State(TypedDict):
    """A job's way through the graph."""

    number: int
    history: Annotated[list[AnyMessage], operator.add]
    seen: Annotated[list[CallSeen], operator.add]


def graph_of(model: Any, jobs: list[Job], tick: Callable[[], None]) -> StateGraph[Any, Any, Any, Any]:
    """Return the graph: ask, look up, ask again, until all was said."""

    async def asks(state: State) -> dict[str, Any]:
        number, calls = state["number"], len(state["seen"])
        said = HumanMessage(jobs[number].said[calls])
        call, answer = await ask(model, [*state["history"], said], session=number, number=calls)
        tick()
        return {"history": [said, AIMessage(answer)], "seen": [call]}

    async def looks_up(state: State) -> dict[str, Any]:
        number = state["number"]
        await look_up.ainvoke({"job": number, "seconds": jobs[number].waits_s[len(state["seen"]) - 1]})
        return {}

    def goes_on(state: State) -> str:
        return "look_up" if len(state["seen"]) < len(jobs[state["number"]].said) else "__end__"

    graph = StateGraph(State).add_node("ask", asks).add_node("look_up", looks_up)
    return graph.add_edge(START, "ask").add_conditional_edges("ask", goes_on).add_edge("look_up", "ask")


async def turn(place: Place, engine: Engine, arm: Arm, seed: int, shape: Shape, tick: Callable[[], None]) -> Measured:
    """Run one arm from an empty cache."""
    jobs, calls = jobs_of(shape, place.tokens, seed), list[CallSeen]()
    backend = backend_at(place, engine.url, engine.model, arm.max_saved)
    async with model_at(engine.url, engine.model) as model:
        await model.ainvoke("hello", max_tokens=4)  # the first call after a pause is slower
        engine.empty_cache()
        with orla_of(arm, [backend], {"*": BACKEND}) as orla:
            graph: Any = graph_of(model.bind(max_tokens=ANSWER_TOKENS), jobs, tick).compile()
            served = graph if orla is None else orla.wrap(graph)
            begin_s = time.perf_counter()

            async def one(number: int) -> None:
                await asyncio.sleep(jobs[number].begin_s)
                ended = await served.ainvoke({"number": number, "history": [], "seen": []})
                calls.extend(call.since(begin_s) for call in ended["seen"])

            async with asyncio.TaskGroup() as group:
                for number in range(len(jobs)):
                    group.create_task(one(number))
            makespan_s = time.perf_counter() - begin_s
            return Measured(SITUATION, place.title, arm.name, seed, calls, makespan_s, warm_ups_of(orla, BACKEND))
