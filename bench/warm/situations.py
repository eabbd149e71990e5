"""The situations: tool waits, the next stage, and the night; each is a load, a graph, and one turn of an arm."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from random import Random
from typing import Annotated, Any, ClassVar, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.client import ask, connected, model_at, warm, wrapped
from bench.lib.engines import LLAMACPP
from bench.lib.workflows import Session, agent, turn_of
from bench.warm.arms import (
    AGAIN,
    BACKEND,
    BARE,
    COLD,
    SAVED,
    WARM,
    Arm,
    Place,
    backend_at,
    crowded,
    overnight,
    warm_ups_of,
)  # fmt: skip
from bench.warm.texts import BEGINNING, TOOLS, job_file, text
from orla_lg import Backend, Orla
from orla_lg_sim.server import SimServer

ANSWER_TOKENS, GROW_TOKENS = 16, 50
PLANNER = "planner"
PLAN_TOKENS, FILE_TOKENS = 128, 60
CROWD = 3
"""Others between two runs."""
LEARN = 3
"""Runs before the second stage's beginning is certain; the same in all arms, and not counted."""
SAVED_PATIENCE_S = 10.0
NIGHT_S = 1.5
"""After the restart; longer than an engine may have been unheard of when a run returns to it."""

Tick = Callable[[], None]


class Situation:
    """What is measured, on which engine, and in which arms."""

    title: ClassVar[str]
    arms: ClassVar[tuple[Arm, ...]] = (BARE, AGAIN, COLD, WARM)
    engine = staticmethod(crowded)

    def arms_at(self, place: Place, wanted: list[str]) -> list[Arm]:
        """Return the arms that make sense at a place: only llama.cpp saves slots."""
        found = [arm for arm in self.arms if arm.name in wanted]
        return [arm for arm in found if not arm.max_saved or place.engine == LLAMACPP]

    def where(self, place: Place) -> str:
        return f"{self.title}, {place.title}"


async def one_by_one(
    runs: int, run: Callable[[int], Awaitable[dict[str, Any]]], tick: Tick
) -> tuple[list[CallSeen], list[JobSeen]]:
    """Let runs follow each other; times count from now."""
    calls, jobs, begin_s = list[CallSeen](), list[JobSeen](), time.perf_counter()
    for number in range(runs):
        arrived_s = time.perf_counter() - begin_s
        ended = await run(number)
        calls += [CallSeen(**call).since(begin_s) for call in ended["seen"]]
        jobs.append(JobSeen(number, arrived_s, time.perf_counter() - begin_s))
        tick()
    return calls, jobs


class State(TypedDict):
    number: int
    file: str
    history: Annotated[list[AnyMessage], operator.add]
    seen: Annotated[list[dict[str, Any]], operator.add]
    """``CallSeen``, as what a checkpoint holds anyway."""


def state_of(number: int, file: str) -> dict[str, Any]:
    return {"number": number, "file": file, "history": [], "seen": []}


@tool
async def look_up(job: int, seconds: float) -> str:
    """Look a job up in the yard's papers, which takes its time."""
    await asyncio.sleep(seconds)
    return f"job {job}: found"


async def looks_up(number: int, wait_s: float) -> None:
    await look_up.ainvoke({"job": number, "seconds": wait_s})


@dataclass(frozen=True)
class ToolWaits(Situation):
    """Workflows ask, wait for a tool that takes seconds, and ask again, while others push their cache out."""

    workflows: int = 4
    """As many as two places hold, and as many again."""
    calls: int = 5
    wait_s: float = 12.0
    """Of the tool, on the mean; a quarter more or less."""
    title = "tool waits"

    @property
    def steps(self) -> int:
        return self.workflows * self.calls

    def jobs(self, tokens: int, seed: int) -> list[Session]:
        """Make up the jobs of a round; they arrive evenly over one wait."""
        dice, made = Random(seed), []
        for number in range(self.workflows):
            first = job_file(100 * seed + number, dice, round(tokens * dice.uniform(0.9, 1.1)))
            later = [text(dice, GROW_TOKENS) for _ in range(self.calls - 1)]
            waits_s = tuple(self.wait_s * dice.uniform(0.75, 1.25) for _ in range(self.calls))
            made.append(Session(number * self.wait_s / self.workflows, (first, *later), waits_s[:-1]))
        return made

    async def turn(self, place: Place, engine: Any, arm: Arm, seed: int, tick: Tick) -> Turn:
        """Run one arm from an empty cache."""
        jobs, backend = self.jobs(place.tokens, seed), backend_at(place, engine.url, engine.model, arm.max_saved)

        def graph(model: Any) -> Any:
            return agent(jobs, model.bind(max_tokens=ANSWER_TOKENS), tool=looks_up, tick=tick).compile()

        return await turn_of(
            arm, engine, backend, jobs, graph, seed=seed, place=self.where(place), mapper={"*": BACKEND},
            showing=warm_ups_of,
        )  # fmt: skip


@dataclass(frozen=True)
class NextStage(Situation):
    """While the first stage generates, what the second one's prompts begin with is prefilled.

    Between two runs others fill the cache with job files of their own. On vLLM both stages call the same engine. On
    llama.cpp, whose warm-ups wait until no call is in flight, the first stage calls another backend: a simulated
    engine, which takes time to generate and no core.
    """

    runs: int = 6
    title = "next stage"

    @property
    def steps(self) -> int:
        return LEARN + self.runs

    async def turn(self, place: Place, engine: Any, arm: Arm, seed: int, tick: Tick) -> Turn:
        """Run one arm from an empty cache."""
        dice, worker = Random(seed), backend_at(place, engine.url, engine.model, arm.max_saved)
        with planner_at(place, engine) as (url, name, more):
            mapper = {"*": BACKEND, "make_plan": PLANNER if more else BACKEND}
            async with model_at(url, name) as first, model_at(engine.url, engine.model) as second:
                await warm(second)
                engine.empty_cache()
                with connected([worker, *more], mapper, wrapped=arm.orla is not None, **(arm.orla or {})) as orla:
                    runs, others = (wrapped(orla, graph.compile()) for graph in plan_and_order(first, second))

                    async def run(number: int) -> dict[str, Any]:
                        for other in range(CROWD):
                            await others.ainvoke(state_of(-1, job_file(100 * number + other, dice, place.tokens)))
                        return await runs.ainvoke(state_of(number, f"Job {number}: {text(dice, FILE_TOKENS)}"))

                    calls, jobs = await one_by_one(self.steps, run, tick)
                    return Turn(arm.name, seed, 0, calls, jobs, place=self.where(place), more=warm_ups_of(orla))


@contextmanager
def planner_at(place: Place, engine: Any) -> Iterator[tuple[str, str, list[Backend]]]:
    """Give URL and model of the first stage's engine, and the backend that it is beside the worker."""
    if place.engine != LLAMACPP:
        yield engine.url, engine.model, []
        return
    with SimServer(model="sim") as sim:
        yield sim.url, "sim", [Backend(PLANNER, sim.url, "sim", engine="sim")]


def plan_and_order(first: Any, second: Any) -> list[StateGraph[Any, Any, Any, Any]]:
    """Return two graphs: plan, then write the order with rules and tools; and what others send to fill the cache."""
    planner = first.bind(max_tokens=PLAN_TOKENS, extra_body={"ignore_eos": True})
    writer, reader = second.bind_tools(TOOLS).bind(max_tokens=ANSWER_TOKENS), second.bind(max_tokens=4)

    async def make_plan(state: State) -> dict[str, Any]:
        asked = [SystemMessage("You plan repairs."), HumanMessage(state["file"])]
        call, _ = await ask(planner, asked, session=state["number"], number=0)
        return {"seen": [asdict(call)]}

    async def write_order(state: State) -> dict[str, Any]:
        asked = [SystemMessage(BEGINNING), HumanMessage(state["file"])]
        call, _ = await ask(writer, asked, session=state["number"], number=max(0, state["number"] - LEARN + 1))
        return {"seen": [asdict(call)]}

    async def read(state: State) -> dict[str, Any]:
        await ask(reader, [HumanMessage(state["file"])], session=-1, number=0)
        return {}

    both = StateGraph(State).add_sequence([make_plan, write_order]).add_edge(START, "make_plan")
    return [both, StateGraph(State).add_node("read", read).add_edge(START, "read")]


@dataclass(frozen=True)
class Night(Situation):
    """Runs are interrupted for a human, the engine is restarted, the runs are resumed one after the other."""

    runs: int = 3
    """Interrupted at the same time, on a thread each."""
    prepare_s: float = 4.0
    """What the node's own code does between the resume and its call: a file is read, a customer looked up."""
    title, arms, engine = "the night", (BARE, COLD, SAVED, WARM), staticmethod(overnight)

    @property
    def steps(self) -> int:
        return self.runs

    async def turn(self, place: Place, engine: Any, arm: Arm, seed: int, tick: Tick) -> Turn:
        """Run one arm: from before the evening to the last run's end in the morning, the restart not counted."""
        dice, backend = Random(seed), backend_at(place, engine.url, engine.model, arm.max_saved)
        threads = [{"configurable": {"thread_id": f"job-{number}"}} for number in range(self.runs)]
        async with model_at(engine.url, engine.model) as model:
            with connected([backend], {"*": BACKEND}, wrapped=arm.orla is not None, **(arm.orla or {})) as orla:
                served = wrapped(orla, interrupted(model, self.prepare_s).compile(InMemorySaver()))
                for number, thread in enumerate(threads):
                    file = job_file(100 * seed + number, dice, place.tokens)
                    await served.ainvoke(state_of(number, file), thread)
                await put_aside(orla, arm, self.runs)
                await asyncio.to_thread(engine.restart)
                await asyncio.sleep(NIGHT_S)
                await warm(model)

                async def run(number: int) -> dict[str, Any]:
                    return await served.ainvoke(Command(resume=f"Yes, go on with job {number}."), threads[number])

                calls, jobs = await one_by_one(self.runs, run, tick)
                return Turn(arm.name, seed, 0, calls, jobs, place=self.where(place), more=warm_ups_of(orla))


def interrupted(model: Any, prepare_s: float) -> StateGraph[Any, Any, Any, Any]:
    """Return the graph: ask, let a human speak, prepare, answer."""
    model = model.bind(max_tokens=ANSWER_TOKENS)

    async def first(state: State) -> dict[str, Any]:
        asked = HumanMessage(state["file"])
        call, answer = await ask(model, [asked], session=state["number"], number=0)
        return {"history": [asked, AIMessage(answer)], "seen": [asdict(call)]}

    def human(state: State) -> dict[str, Any]:
        return {"history": [HumanMessage(interrupt("Shall we go on?"))]}

    async def answer(state: State) -> dict[str, Any]:
        await asyncio.sleep(prepare_s)
        call, _ = await ask(model, state["history"], session=state["number"], number=1)
        return {"seen": [asdict(call)]}

    return StateGraph(State).add_sequence([first, human, answer]).add_edge(START, "first")


async def put_aside(orla: Orla | None, arm: Arm, runs: int) -> None:
    """Wait until every thread's slot is saved, where the arm saves."""
    if orla is None or not arm.max_saved:
        return
    deadline_s = time.monotonic() + SAVED_PATIENCE_S
    while sum("save:saved" in record.cache_orders for record in orla.records()) < runs:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"{arm.name}: not all of {runs} slots were saved in {SAVED_PATIENCE_S:g} s")
        await asyncio.sleep(0.05)
