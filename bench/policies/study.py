"""The runs, of five kinds with a heavy tail, when they arrive, and one policy before the simulated engine."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import log
from pathlib import Path

from bench.lib.core import START, Ask, Backend, Edge, GraphStructure, Hints, Queued, RunState, Sortable
from bench.lib.virtual import Runs
from orla_lg_sim import arrivals as traces
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest

TEXT = "x" * 40_000


class Clairvoyant:
    """Serves the run with the least service left, which no policy can know."""

    steady = True

    def __init__(self) -> None:
        self.left_s: dict[str, float] = {}
        """By call: its run's service from there to its end, the call included."""

    def key(self, head: Queued, now: float) -> Sortable:
        return (self.left_s[head.call.id], head.order)


@dataclass(frozen=True, slots=True)
class Ended:
    """One run as its user saw it."""

    kind: str
    tenant: str
    completion_s: float
    first_token_s: float
    """From its arrival to the first token of its last call's answer."""


class Study:
    """One policy, one sequence of runs, one engine."""

    def __init__(self, engine: EngineParameters, policy: str) -> None:
        self._parameters, self._numbers = engine, count()
        self._clairvoyant = Clairvoyant() if policy == "clairvoyant" else None
        backend = Backend("sim", "http://sim/v1", max_concurrency=CONCURRENCY, capacity=1_000_000)
        choice = self._clairvoyant or policy
        self.runs = Runs(backend, SimEngine(engine), stage_policy=choice, request_policy=choice, keep_records=10)
        self._ended: dict[int, Ended] = {}

    def run(self, work: Sequence[tuple[float, Plan]]) -> list[Ended]:
        """Return how the runs ended, in order of their arrival."""
        with self.runs.virtual as virtual:
            virtual.run(self._all(work))
        return [self._ended[number] for number in sorted(self._ended)]

    async def _all(self, work: Sequence[tuple[float, Plan]]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, (at_s, plan) in enumerate(work):
                await asyncio.sleep(at_s - self.runs.clock())
                group.create_task(self._play(number, plan))

    async def _play(self, number: int, plan: Plan) -> None:
        runs, began_s, left_s = self.runs, self.runs.clock(), plan.service_s(self._parameters)
        forecast = runs.virtual.serving.lookahead.forecast(plan.kind, structure_of(plan.kind), {})
        state = runs.begin(f"run {number}", forecast=forecast)
        first_s = began_s
        for at, step in enumerate(plan.steps):
            for stage, _ in step.calls:
                runs.progress.node_entered(state, stage, f"{stage}:{at}", at)
            async with asyncio.TaskGroup() as group:
                calls = [
                    group.create_task(self._call(state, stage, at, size, plan.hints, left_s))
                    for stage, size in step.calls
                ]
            first_s = min(each.result() for each in calls)
            for stage, _ in step.calls:
                runs.progress.node_left(state, stage, f"{stage}:{at}")
            left_s -= sum(size.service_s(self._parameters) for _, size in step.calls)
            await asyncio.sleep(step.tool_s)
        runs.end(state)
        tenant = plan.hints.tenant or ""
        self._ended[number] = Ended(plan.kind, tenant, runs.clock() - began_s, first_s - began_s)

    async def _call(self, state: RunState, stage: str, at: int, size: Size, hints: Hints, left_s: float) -> float:
        """Make a call; returns when its first token came."""
        ask = Ask("sim", [{"role": "user", "content": TEXT[: 4 * size.prompt_tokens]}])
        request = SimRequest(f"call {next(self._numbers)}", size.prompt_tokens, size.output_tokens)
        if self._clairvoyant is not None:
            self._clairvoyant.left_s[request.id] = left_s
        came_s = self.runs.clock()
        record = await self.runs.call(state, stage, ask, request, step=at, namespace=f"{stage}:{at}", said=hints)
        return came_s + record.queue_wait_s + (record.ttft_s or 0.0)


def play(engine: EngineParameters, policy: str, work: Sequence[tuple[float, Plan]]) -> list[Ended]:
    """Run one arm."""
    return Study(engine, policy).run(work)


def throughput(engine: EngineParameters, dice: random.Random) -> float:
    """Return how much service (``Plan.service_s``) a second the engine does when it is never idle."""
    sizes = [size for plan in plans(300, dice) for step in plan.steps for _, size in step.calls]
    dice.shuffle(sizes)
    single = [Plan("chat", [Step((("answer", size),))], Hints()) for size in sizes]
    study = Study(engine, "fcfs")
    study.run([(0.0, plan) for plan in single])
    return sum(plan.service_s(engine) for plan in single) / study.runs.clock()


CONCURRENCY = 8
"""Calls that the engine runs at once, so that queues are ours."""


@dataclass(frozen=True, slots=True)
class Size:
    """One call: what it takes."""

    prompt_tokens: int
    output_tokens: int

    def service_s(self, engine: EngineParameters) -> float:
        """Return its part of a full engine's time."""
        decode_s = engine.step_s / CONCURRENCY + engine.decode_sequence_s
        return self.prompt_tokens * engine.prefill_token_s + self.output_tokens * decode_s


@dataclass(frozen=True, slots=True)
class Step:
    """One superstep: calls side by side, each in a node of its own, and the tool that runs after them."""

    calls: tuple[tuple[str, Size], ...]
    tool_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run: what will happen in it, which only the clairvoyant knows."""

    kind: str
    steps: Sequence[Step]
    hints: Hints

    def service_s(self, engine: EngineParameters) -> float:
        return sum(size.service_s(engine) for step in self.steps for _, size in step.calls)


def _size(dice: random.Random, prompt_tokens: float, output_tokens: float) -> Size:
    """Draw lengths around these medians."""
    prompt, output = prompt_tokens * dice.lognormvariate(0, 0.5), output_tokens * dice.lognormvariate(0, 0.7)
    return Size(min(4000, max(16, int(prompt))), min(1000, max(4, int(output))))


def _step(dice: random.Random, *calls: tuple[str, int, int], tool: bool = False) -> Step:
    """Draw a step of calls with these median lengths of prompt and answer."""
    sizes = tuple((stage, _size(dice, prompt_tokens, output_tokens)) for stage, prompt_tokens, output_tokens in calls)
    return Step(sizes, min(10.0, dice.lognormvariate(log(0.4), 1.0)) if tool else 0.0)


def _rounds(dice: random.Random, least: int, shape: float, most: int) -> int:
    """Draw from a Pareto distribution: the longer it went on, the longer it will."""
    return min(most, int(least * dice.paretovariate(shape)))


def chat(dice: random.Random) -> list[Step]:
    return [_step(dice, ("answer", 150, 50))]


def lookup(dice: random.Random) -> list[Step]:
    rewrite = _step(dice, ("rewrite", 100, 15), tool=True)
    return [rewrite, _step(dice, ("answer", 500, 80)), _step(dice, ("check", 300, 8))]


def review(dice: random.Random) -> list[Step]:
    readers = _step(dice, *((f"reader {n}", 400, 50) for n in range(dice.randint(2, 5))))
    return [_step(dice, ("plan", 200, 60)), readers, _step(dice, ("merge", 600, 120))]


def agent(dice: random.Random) -> list[Step]:
    loop = [_step(dice, ("think", 300, 40), tool=True) for _ in range(_rounds(dice, 3, 1.5, 24))]
    return [*loop, _step(dice, ("report", 400, 150))]


def research(dice: random.Random) -> list[Step]:
    loop: list[Step] = []
    for _ in range(_rounds(dice, 2, 1.3, 12)):
        loop.append(_step(dice, *((f"search {n}", 300, 50) for n in range(3)), tool=True))
        loop.append(_step(dice, ("judge", 500, 30)))
    return [_step(dice, ("plan", 300, 150)), *loop, _step(dice, ("write", 1000, 400))]


def rounds(dice: random.Random, fewest: int = 1, most: int = 4) -> list[Step]:
    """Draw a run of an agent whose one stage calls tools so many times and then answers."""
    calls = dice.randint(fewest, most)
    asking = [_step(dice, ("model", 300 + 250 * at, 40), tool=True) for at in range(calls)]
    return [*asking, _step(dice, ("model", 300 + 250 * calls, 150))]


KINDS = {
    chat: (0.50, 3, 3000.0),
    lookup: (0.25, 2, 6000.0),
    review: (0.12, 1, 9000.0),
    agent: (0.10, 0, 12000.0),
    research: (0.03, 0, 18000.0),
}
"""By kind of workflow: its share, the priority its user gives it, and the deadline of its calls in seconds, which
lies far enough off that none is missed."""

GRAPHS: dict[str, dict[str, tuple[Sequence[str], Sequence[str]]]] = {
    "chat": {START: (["answer"], [])},
    "lookup": {START: (["rewrite"], []), "rewrite": (["answer"], []), "answer": (["check"], [])},
    "review": {
        START: (["plan"], []),
        "plan": ([], [f"reader {n}" for n in range(5)]),
        **{f"reader {n}": (["merge"], []) for n in range(5)},
    },
    "agent": {START: (["think"], []), "think": ([], ["think", "report"])},
    "rounds": {START: (["model"], []), "model": ([], ["model"])},
    "research": {
        START: (["plan"], []),
        "plan": ([f"search {n}" for n in range(3)], []),
        **{f"search {n}": (["judge"], []) for n in range(3)},
        "judge": ([], [*(f"search {n}" for n in range(3)), "write"]),
    },
}
"""By kind and stage, what always follows it, and what perhaps does: what ``wrap`` reads of a graph."""


def structure_of(kind: str) -> GraphStructure:
    """Return a kind's graph as ``Orla.wrap`` would see it."""
    found = {stage: Edge(frozenset(always), frozenset(perhaps)) for stage, (always, perhaps) in GRAPHS[kind].items()}
    targets = {each for edge in found.values() for each in (*edge.always, *edge.perhaps)}
    return GraphStructure(found | {stage: Edge() for stage in targets - found.keys()})


def plans(count: int, dice: random.Random) -> list[Plan]:
    """Draw runs from the mixture."""
    made = []
    for kind in dice.choices(list(KINDS), [share for share, _, _ in KINDS.values()], k=count):
        _, priority, deadline_s = KINDS[kind]
        hints = Hints(priority=priority, deadline_s=deadline_s, tenant=f"tenant {dice.randrange(4)}")
        made.append(Plan(kind.__name__, kind(dice), hints))
    return made


def gaps(count: int, dice: random.Random, trace: Path | None, engine: EngineParameters) -> list[float]:
    """Return gaps between arrivals with a mean of one: a trace's, or generated with a heavy tail."""
    if trace is None:
        drawn = [dice.lognormvariate(0, 1.0) for _ in range(count)]
    else:
        times = [arrival.at_s for arrival in traces.read(trace, engine).arrivals]
        between = [after - before for before, after in itertools.pairwise(times)]
        begin = dice.randrange(len(between))
        drawn = [between[(begin + n) % len(between)] for n in range(count)]
    mean = sum(drawn) / count
    return [gap / mean for gap in drawn]


def arrange(
    drawn: Sequence[Plan], between: Sequence[float], offered: float, engine: EngineParameters, capacity: float
) -> list[tuple[float, Plan]]:
    """Return runs with their arrivals, so that what arrives is *offered* of the engine's *capacity*."""
    total_s = sum(plan.service_s(engine) for plan in drawn)
    gap_s = total_s / (capacity * offered) / len(drawn)
    return list(zip(itertools.accumulate(gap * gap_s for gap in between), drawn, strict=True))
