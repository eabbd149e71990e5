"""One policy in front of the simulated engine, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.lib.core import (
    Ask,
    Backend,
    Hints,
    Identity,
    InFlightCall,
    Outcome,
    Queued,
    RequestChoice,
    Sortable,
    StageChoice,
    arrive,
)
from bench.policies.workflows import CONCURRENCY, Plan, Size, Step, plans
from orla_lg.testing.virtual import VirtualServing
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest

TEXT = "x" * 40_000


class Clairvoyant:
    """Least remaining service first, which it is told."""

    steady = True

    def __init__(self) -> None:
        self.remaining_s: dict[str, float] = {}
        """By call: what its run needs from there to its end, the call included."""

    def key(self, head: Queued, now: float) -> Sortable:
        return (self.remaining_s[head.call.id], head.order)


@dataclass(frozen=True, slots=True)
class Ended:
    """One run as its user saw it."""

    kind: str
    tenant: str
    completion_s: float


class Study:
    """One policy, one sequence of runs, one engine."""

    def __init__(self, engine: EngineParameters, stage: StageChoice, request: RequestChoice) -> None:
        self._parameters = engine
        self._sizes: dict[str, Size] = {}
        self._clairvoyant = stage if isinstance(stage, Clairvoyant) else None
        backend = Backend("sim", "http://sim/v1", max_concurrency=CONCURRENCY, capacity=1_000_000)
        self._virtual = VirtualServing[SimRequest](
            {backend: SimEngine(engine)}, self._request, stage_policy=stage, request_policy=request, keep_records=10
        )
        self._ended: list[tuple[int, Ended]] = []

    def _request(self, inflight: InFlightCall) -> SimRequest:
        size = self._sizes.pop(inflight.call.id)
        return SimRequest(inflight.call.id, size.prompt_tokens, size.output_tokens)

    def run(self, work: Sequence[tuple[float, Plan]]) -> list[Ended]:
        """Return how the runs ended, in order of their arrival."""
        with self._virtual as virtual:
            virtual.run(self._all(work))
        return [ended for _, ended in sorted(self._ended, key=lambda each: each[0])]

    async def _all(self, work: Sequence[tuple[float, Plan]]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, (at_s, plan) in enumerate(work):
                await asyncio.sleep(at_s - self._virtual.clock())
                group.create_task(self._play(number, plan))

    async def _play(self, number: int, plan: Plan) -> None:
        serving, clock, run = self._virtual.serving, self._virtual.clock, f"run {number}"
        began_s, left_s = clock(), plan.service_s(self._parameters)
        state = serving.progress.run_started(run, thread=None, graph=plan.kind)
        for step in plan.steps:
            for stage, _ in step.calls:
                serving.progress.node_entered(state, stage)
            async with asyncio.TaskGroup() as group:
                for stage, size in step.calls:
                    group.create_task(self._call(Identity(run, run, stage), size, plan.hints, left_s))
            for stage, size in step.calls:
                serving.progress.node_left(state, stage)
                left_s -= size.service_s(self._parameters)
            await asyncio.sleep(step.tool_s)
        serving.progress.run_ended(run, Outcome.DONE)
        self._ended.append((number, Ended(plan.kind, plan.hints.tenant or "", clock() - began_s)))

    async def _call(self, identity: Identity, size: Size, hints: Hints, left_s: float) -> None:
        serving = self._virtual.serving
        ask = Ask("sim", [{"role": "user", "content": TEXT[: 4 * size.prompt_tokens]}])
        inflight = arrive(serving.services, identity, ask, call_id=serving.new_id(), said=hints)
        self._sizes[inflight.call.id] = size
        if self._clairvoyant is not None:
            self._clairvoyant.remaining_s[inflight.call.id] = left_s
        await self._virtual.serve(inflight)


def play(engine: EngineParameters, policy: str, work: Sequence[tuple[float, Plan]]) -> list[Ended]:
    """Run one arm."""
    chosen = Clairvoyant() if policy == "clairvoyant" else policy
    return Study(engine, chosen, chosen).run(work)


def throughput(engine: EngineParameters, dice: random.Random) -> float:
    """Return how much service (``Plan.service_s``) a second the engine does when it is never idle."""
    calls = [call for plan in plans(300, dice) for step in plan.steps for call in step.calls]
    dice.shuffle(calls)
    single = [Plan("single", (Step((call,)),), Hints()) for call in calls]
    study = Study(engine, "fcfs", "fcfs")
    study.run([(0.0, plan) for plan in single])
    return sum(plan.service_s(engine) for plan in single) / study._virtual.clock()
