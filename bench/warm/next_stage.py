"""The next stage: while the first one generates, what the second one's prompts begin with is prefilled.

Between two runs others fill the cache with job files of their own. On vLLM both stages call the same engine. On
llama.cpp, whose warm-ups wait until no call is in flight, the first stage calls another backend: a simulated engine,
which takes time to generate and no core.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.graph import START, StateGraph

from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.client import ask, connected, model_at, warm, wrapped
from bench.lib.engines import LLAMACPP, Engine
from bench.warm.arms import BACKEND, Arm, Place, backend_at, warm_ups_of
from bench.warm.texts import BEGINNING, TOOLS, job_file, text
from orla_lg import Backend
from orla_lg_sim.server import SimServer

SITUATION = "next stage"
PLANNER = "planner"
PLAN_TOKENS, ORDER_TOKENS, FILE_TOKENS = 128, 16, 60
CROWD = 3
"""Others between two runs."""
LEARN = 3
"""Runs before the second stage's beginning is certain; the same in all arms, and not counted."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The load: one run after the other."""

    runs: int = 6


class State(TypedDict):
    run: int
    file: str
    plan: str
    seen: Annotated[list[CallSeen], operator.add]


def graph_of(planner: Any, worker: Any) -> StateGraph[Any, Any, Any, Any]:
    """Return the graph: plan, then write the order with rules and tools."""

    async def plan(state: State) -> dict[str, Any]:
        said = [SystemMessage("You plan repairs."), HumanMessage(state["file"])]
        call, answer = await ask(planner, said, session=state["run"], number=0)
        return {"plan": answer, "seen": [call]}

    async def order(state: State) -> dict[str, Any]:
        said = [SystemMessage(BEGINNING), HumanMessage(state["file"])]
        call, _ = await ask(worker, said, session=state["run"], number=max(0, state["run"] - LEARN + 1))
        return {"seen": [call]}

    graph = StateGraph(State).add_sequence([("make_plan", plan), ("write_order", order)])
    return graph.add_edge(START, "make_plan")


class Other(TypedDict):
    file: str


def others_of(model: Any) -> StateGraph[Any, Any, Any, Any]:
    """Return the graph of those who fill the cache."""

    async def read(state: Other) -> dict[str, Any]:
        await ask(model, [HumanMessage(state["file"])], session=-1, number=0)
        return {}

    return StateGraph(Other).add_node("read", read).add_edge(START, "read")


@contextmanager
def planner_at(place: Place, engine: Engine) -> Iterator[tuple[str, str, list[Backend]]]:
    """Give URL and model of the first stage's engine, and the backend that it is beside the worker."""
    if place.engine != LLAMACPP:
        yield engine.url, engine.model, []
        return
    with SimServer(model="sim") as sim:
        yield sim.url, "sim", [Backend(PLANNER, sim.url, "sim", engine="sim")]


async def turn(place: Place, engine: Engine, arm: Arm, seed: int, shape: Shape, tick: Callable[[], None]) -> Turn:
    """Run one arm from an empty cache."""
    dice, calls, jobs = Random(seed), list[CallSeen](), list[JobSeen]()
    worker = backend_at(place, engine.url, engine.model, arm.max_saved)
    with planner_at(place, engine) as (url, name, more):
        mapper = {"*": BACKEND, "make_plan": PLANNER if more else BACKEND}
        async with model_at(url, name) as first, model_at(engine.url, engine.model) as second:
            await warm(second)
            engine.empty_cache()
            with connected([worker, *more], mapper, wrapped=arm.orla is not None, **(arm.orla or {})) as orla:
                planner = first.bind(max_tokens=PLAN_TOKENS, extra_body={"ignore_eos": True})
                writer = second.bind_tools(TOOLS).bind(max_tokens=ORDER_TOKENS)
                runs = wrapped(orla, graph_of(planner, writer).compile())
                others = wrapped(orla, others_of(second.bind(max_tokens=4)).compile())
                begin_s = time.perf_counter()
                for run in range(LEARN + shape.runs):
                    arrived_s = time.perf_counter() - begin_s
                    for other in range(CROWD):
                        await others.ainvoke({"file": job_file(100 * run + other, dice, place.tokens)})
                    file = f"Job {run}: {text(dice, FILE_TOKENS)}"
                    ended = await runs.ainvoke({"run": run, "file": file, "plan": "", "seen": []})
                    calls += [call.since(begin_s) for call in ended["seen"]]
                    jobs.append(JobSeen(run, arrived_s, time.perf_counter() - begin_s))
                    tick()
                where = f"{SITUATION}, {place.title}"
                return Turn(arm.name, seed, 0, calls, jobs, place=where, more=warm_ups_of(orla))
