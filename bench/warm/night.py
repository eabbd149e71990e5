"""The night: runs interrupted for a human, the engine restarted, the runs resumed one after the other."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.client import ask, connected, model_at, warm, wrapped
from bench.warm.arms import BACKEND, Arm, Overnight, Place, backend_at, warm_ups_of
from bench.warm.texts import job_file
from orla_lg import Orla

SITUATION = "the night"
ANSWER_TOKENS = 16
SAVED_PATIENCE_S = 10.0
NIGHT_S = 1.5
"""After the restart; longer than an engine may have been unheard of when somebody returns to it."""


@dataclass(frozen=True, slots=True)
class Shape:
    runs: int = 3
    """Interrupted at the same time, on a thread each."""
    prepare_s: float = 4.0
    """What the node's own code does between the resume and its call: a file is read, a customer looked up."""


class State(TypedDict):
    number: int
    file: str
    history: Annotated[list[AnyMessage], operator.add]
    seen: Annotated[list[dict[str, Any]], operator.add]
    """``CallSeen``, as what a checkpoint holds anyway."""


def graph_of(model: Any, prepare_s: float) -> StateGraph[Any, Any, Any, Any]:
    """Return the graph: ask, let a human speak, prepare, answer."""

    async def first(state: State) -> dict[str, Any]:
        said = HumanMessage(state["file"])
        call, answer = await ask(model, [said], session=state["number"], number=0)
        return {"history": [said, AIMessage(answer)], "seen": [asdict(call)]}

    def human(state: State) -> dict[str, Any]:
        return {"history": [HumanMessage(interrupt("Shall we go on?"))]}

    async def answer(state: State) -> dict[str, Any]:
        await asyncio.sleep(prepare_s)
        call, _ = await ask(model, state["history"], session=state["number"], number=1)
        return {"seen": [asdict(call)]}

    graph = StateGraph(State).add_sequence([("first", first), ("human", human), ("answer", answer)])
    return graph.add_edge(START, "first")


async def turn(place: Place, engine: Overnight, arm: Arm, seed: int, shape: Shape, tick: Callable[[], None]) -> Turn:
    """Run one arm: from before the evening to the last run's end in the morning, the restart not counted."""
    dice, calls, jobs = Random(seed), list[CallSeen](), list[JobSeen]()
    backend = backend_at(place, engine.url, engine.model, arm.max_saved)
    async with model_at(engine.url, engine.model) as model:
        with connected([backend], {"*": BACKEND}, wrapped=arm.orla is not None, **(arm.orla or {})) as orla:
            graph: Any = graph_of(model.bind(max_tokens=ANSWER_TOKENS), shape.prepare_s).compile(InMemorySaver())
            served = wrapped(orla, graph)
            for number in range(shape.runs):
                file = job_file(100 * seed + number, dice, place.tokens)
                await served.ainvoke({"number": number, "file": file, "history": [], "seen": []}, _thread(number))
            await _put_aside(orla, arm, shape.runs)
            await asyncio.to_thread(engine.restart)
            await asyncio.sleep(NIGHT_S)
            await warm(model)
            begin_s = time.perf_counter()
            for number in range(shape.runs):
                arrived_s = time.perf_counter() - begin_s
                ended = await served.ainvoke(Command(resume=f"Yes, go on with job {number}."), _thread(number))
                calls += [CallSeen(**call).since(begin_s) for call in ended["seen"]]
                jobs.append(JobSeen(number, arrived_s, time.perf_counter() - begin_s))
                tick()
            where = f"{SITUATION}, {place.title}"
            return Turn(arm.name, seed, 0, calls, jobs, place=where, more=warm_ups_of(orla))


def _thread(number: int) -> Any:
    return {"configurable": {"thread_id": f"job-{number}"}}


async def _put_aside(orla: Orla | None, arm: Arm, runs: int) -> None:
    """Wait until every thread's slot is saved, where the arm saves."""
    if orla is None or not arm.max_saved:
        return
    deadline_s = time.monotonic() + SAVED_PATIENCE_S
    while sum("save:saved" in record.cache_orders for record in orla.records()) < runs:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"{arm.name}: not all of {runs} slots were saved in {SAVED_PATIENCE_S:g} s")
        await asyncio.sleep(0.05)
