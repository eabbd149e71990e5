"""One policy in front of the simulated engine, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
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
    RunState,
    Sortable,
    StageChoice,
    arrive,
)
from bench.policies.workflows import CONCURRENCY, KINDS, Chain, Kinds, Plan, Size, Step, plans, structure_of
from orla_lg.testing.virtual import VirtualServing
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest

TEXT = "x" * 40_000


@dataclass(frozen=True, slots=True)
class Truth:
    """What a call's run will really need, which no policy can know."""

    remaining_s: float
    """Service from there to its end, the call included."""
    path_s: float
    """The same along the longest branch: what the join waits for."""


class Composed:
    """Orders runs by one figure, and the calls of a run by how long their way to its end will really be."""

    steady = True

    def __init__(self, run: Callable[[Queued, Truth], float], *, by_path: bool) -> None:
        self.truth: dict[str, Truth] = {}
        """By call."""
        self._run = run
        self._by_path = by_path

    def key(self, head: Queued, now: float) -> Sortable:
        truth = self.truth[head.call.id]
        return (self._run(head, truth), -truth.path_s if self._by_path else 0.0, head.order)


def _left_s(head: Queued, truth: Truth) -> float:
    return truth.remaining_s


def _arrival(head: Queued, truth: Truth) -> float:
    return head.call.standing.order


COMPOSED: dict[str, Callable[[], Composed]] = {
    "clairvoyant": lambda: Composed(_left_s, by_path=False),
    "clairvoyant+path": lambda: Composed(_left_s, by_path=True),
    "workflow_fcfs+path": lambda: Composed(_arrival, by_path=True),
}
"""What no policy can know: what each run needs, and which of its branches its joins will wait for."""


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
        self._composed = stage if isinstance(stage, Composed) else None
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
        forecast = serving.foresight.forecast(plan.kind, structure_of(plan.kind), {})
        state = serving.progress.run_started(run, thread=None, forecast=forecast)
        paths_s = [max(_service_s(chain, self._parameters) for _, chain in step.branches) for step in plan.steps]
        for at, step in enumerate(plan.steps):
            for node, _ in step.branches:
                serving.progress.node_entered(state, node, _namespace(node, at), at)
            async with asyncio.TaskGroup() as group:
                for node, chain in step.branches:
                    group.create_task(self._branch(state, plan, at, node, chain, left_s, sum(paths_s[at + 1 :])))
            for node, _ in step.branches:
                serving.progress.node_left(state, node, _namespace(node, at))
            left_s -= sum(size.service_s(self._parameters) for size in step.sizes)
            await asyncio.sleep(step.tool_s)
        serving.progress.run_ended(run, Outcome.DONE)
        self._ended.append((number, Ended(plan.kind, plan.hints.tenant or "", clock() - began_s)))

    async def _branch(
        self, state: RunState, plan: Plan, at: int, node: str, chain: Chain, left_s: float, after_s: float
    ) -> None:
        """Make the calls of a node, or of the graph inside it."""
        progress = self._virtual.serving.progress
        for number, (stage, size) in enumerate(chain):
            namespace = _namespace(node, at)
            if stage != node:
                namespace = f"{namespace}|{stage.rpartition('|')[2]}:{number}"
                progress.node_entered(state, stage, namespace, number)
            truth = Truth(left_s, _service_s(chain[number:], self._parameters) + after_s)
            await self._call(Identity(state.id, state.id, stage, at, namespace), size, plan.hints, truth)
            if stage != node:
                progress.node_left(state, stage, namespace)

    async def _call(self, identity: Identity, size: Size, hints: Hints, truth: Truth) -> None:
        serving = self._virtual.serving
        ask = Ask("sim", [{"role": "user", "content": TEXT[: 4 * size.prompt_tokens]}])
        inflight = arrive(serving.services, identity, ask, call_id=serving.new_id(), said=hints)
        self._sizes[inflight.call.id] = size
        if self._composed is not None:
            self._composed.truth[inflight.call.id] = truth
        await self._virtual.serve(inflight)


def _namespace(node: str, step: int) -> str:
    return f"{node}:{step}"


def _service_s(chain: Chain, engine: EngineParameters) -> float:
    return sum(size.service_s(engine) for _, size in chain)


def play(engine: EngineParameters, policy: str, work: Sequence[tuple[float, Plan]]) -> list[Ended]:
    """Run one arm."""
    chosen = COMPOSED[policy]() if policy in COMPOSED else policy
    return Study(engine, chosen, chosen).run(work)


def throughput(engine: EngineParameters, dice: random.Random, kinds: Kinds = KINDS) -> float:
    """Return how much service (``Plan.service_s``) a second the engine does when it is never idle."""
    drawn = plans(300, dice, kinds)
    sizes = [size for plan in drawn for step in plan.steps for size in step.sizes]
    dice.shuffle(sizes)
    single = [Plan("chat", (Step((("answer", size),)),), Hints()) for size in sizes]
    study = Study(engine, "fcfs", "fcfs")
    study.run([(0.0, plan) for plan in single])
    return sum(plan.service_s(engine) for plan in single) / study._virtual.clock()
