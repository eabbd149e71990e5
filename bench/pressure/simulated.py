"""The arms in virtual time: simulated engine, real core.

A session is a coroutine here instead of a graph. Bare, it asks the engine directly; wrapped, it tells the core what
a wrapped graph would: its run, its nodes, its calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from random import Random
from typing import NamedTuple

from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.core import (
    Ask,
    Backend,
    Capability,
    Effect,
    Identity,
    InFlightCall,
    Outcome,
    Probe,
    RunState,
    Scope,
    Support,
    WorkflowCache,
    arrive,
)
from bench.lib.engines import Message
from bench.lib.workflows import Session
from bench.pressure.arms import Arm
from bench.pressure.workflows import CALLS, Load, LocalWords
from orla_lg.testing.virtual import EngineDriver, StillAdapter, VirtualClock, VirtualServing, run
from orla_lg_sim.blocks import chain
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest
from orla_lg_sim.text import prose

ENDLESS_BLOCKS = 100_000


class Served(NamedTuple):
    """What a session sees of a call."""

    first_s: float
    cached_tokens: int


class Direct:
    """How sessions reach the engine: here, without anything between."""

    def __init__(self, engine: SimEngine, clock: VirtualClock) -> None:
        self.clock = clock
        self._driver = EngineDriver(engine, clock)

    def begin(self, session: int) -> None:
        """A session's graph starts."""

    async def ask(self, session: int, messages: Sequence[Message], request: SimRequest) -> Served:
        """A session's ``agent`` node makes its call."""
        first_s: list[float] = []
        event = await self._driver.run(request.id, request, lambda: first_s.append(self.clock()))
        return Served(first_s[0], event.cached_tokens)

    async def use_tool(self, session: int, wait_s: float) -> None:
        """A session's ``tool`` node waits."""
        await asyncio.sleep(wait_s)

    def end(self, session: int) -> None:
        """A session's graph ends."""


class Wrapped(Direct):
    """The engine behind the core."""

    def __init__(self, virtual: VirtualServing[SimRequest], requests: dict[str, SimRequest]) -> None:
        self.clock = virtual.clock
        self._virtual = virtual
        self._requests = requests
        """By call, for the engine to be given."""
        self._runs: dict[int, RunState] = {}

    def begin(self, session: int) -> None:
        progress = self._virtual.serving.progress
        self._runs[session] = progress.run_started(f"run-{session}", thread=None, graph="session")

    async def ask(self, session: int, messages: Sequence[Message], request: SimRequest) -> Served:
        state, serving = self._runs[session], self._virtual.serving
        serving.progress.node_entered(state, "agent")
        identity = Identity(state.workflow, state.id, "agent")
        ask = Ask("auto", messages, stream=True, max_tokens=request.output_tokens)
        inflight = arrive(serving.services, identity, ask, call_id=request.id)
        self._requests[inflight.call.id] = request
        called_s = self.clock()
        record = await self._virtual.serve(inflight)
        serving.progress.node_left(state, "agent")
        assert record.ttft_s is not None and record.error is None
        return Served(called_s + record.queue_wait_s + record.ttft_s, record.cached_tokens or 0)

    async def use_tool(self, session: int, wait_s: float) -> None:
        state, serving = self._runs[session], self._virtual.serving
        serving.progress.node_entered(state, "tool")
        await asyncio.sleep(wait_s)
        serving.progress.node_left(state, "tool")

    def end(self, session: int) -> None:
        self._virtual.serving.progress.run_ended(self._runs[session].id, Outcome.DONE)


class Plugged(StillAdapter):
    """What vLLM's adapter is before an engine with the plugin: it has workflows pinned, released and flushed."""

    def __init__(self, probe: Probe, engine: SimEngine) -> None:
        super().__init__(probe)
        self._engine = engine
        self.clock: VirtualClock | None = None

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        assert isinstance(scope, WorkflowCache) and self.clock is not None
        until_s = inf if ttl_s is None else self.clock() + ttl_s
        return Effect.PINNED if self._engine.ownership.pin_workflow(scope.workflow, until_s) else Effect.FAILED

    async def release(self, scope: Scope) -> Effect:
        assert isinstance(scope, WorkflowCache)
        self._engine.ownership.release_workflow(scope.workflow)
        return Effect.DEMOTED

    async def flush(self, scope: Scope) -> Effect:
        assert isinstance(scope, WorkflowCache)
        self._engine.ownership.flush_workflow(scope.workflow)
        return Effect.FREED


PLAIN = (Capability.CACHED_TOKENS, Capability.PRIORITY)
WITH_PLUGIN = (*PLAIN, Capability.PIN, Capability.RELEASE, Capability.FLUSH_WORKFLOW)


class SimulatedTurns:
    """Runs arms on an engine with these parameters."""

    def __init__(self, parameters: EngineParameters, words: LocalWords) -> None:
        self.parameters = parameters
        self._words = words

    def turn(self, arm: Arm, load: Load) -> Turn:
        """Run one arm from an empty cache."""
        made = Turn(arm.name, load.seed, load.shared_tokens, [], [])
        # vLLM keeps one of the blocks that it reports for itself.
        blocks = ENDLESS_BLOCKS if arm.endless else self.parameters.kv_blocks - 1
        engine = SimEngine(replace(self.parameters, kv_blocks=blocks))
        if not arm.wrapped:
            clock = VirtualClock()
            run(self._sessions(Direct(engine, clock), arm, load, made), clock)
            return made
        requests: dict[str, SimRequest] = {}

        def request_of(inflight: InFlightCall) -> SimRequest:
            told = inflight.request_fields()["told"]
            owner = told.workflow if arm.plugin else None
            return replace(requests[inflight.call.id], priority=-round(told.priority), workflow=owner)  # lower first

        backend, adapter = Backend("engine", "http://engine/v1"), self._adapter(arm, engine)
        with VirtualServing(
            {backend: engine}, request_of, adapters={"engine": adapter}, admission=arm.admission
        ) as virtual:
            if isinstance(adapter, Plugged):
                adapter.clock = virtual.clock
            virtual.run(self._sessions(Wrapped(virtual, requests), arm, load, made))
        return made

    def _adapter(self, arm: Arm, engine: SimEngine) -> StillAdapter:
        """Say what vLLM's adapter says of such an engine."""
        native = WITH_PLUGIN if arm.plugin else PLAIN
        can = {each: Support.NATIVE if each in native else Support.UNSUPPORTED for each in Capability}
        probe = Probe(
            capabilities=can,
            context_tokens=self.parameters.context_tokens,
            kv_tokens=self.parameters.kv_tokens,
        )
        return Plugged(probe, engine) if arm.plugin else StillAdapter(probe)

    async def _sessions(self, line: Direct, arm: Arm, load: Load, made: Turn) -> None:
        door = arm.door()

        async def play(number: int, session: Session) -> None:
            await asyncio.sleep(session.begin_s)
            arrived_s = line.clock()
            async with door:
                await self._session(line, arm, load, made, number, arrived_s)
            made.jobs.append(JobSeen(number, arrived_s, line.clock()))

        async with asyncio.TaskGroup() as group:
            for number, session in enumerate(load.sessions):
                group.create_task(play(number, session))

    async def _session(self, line: Direct, arm: Arm, load: Load, made: Turn, session: int, arrived_s: float) -> None:
        mine = load.sessions[session]
        line.begin(session)
        history = load.opening(mine)
        for number in range(CALLS):
            answer = prose(Random(f"{load.seed} {session} {number}"), load.answer_tokens)
            request = self._request(f"{session}/{number}", history, answer, session if arm.by_arrival else 0)
            called_s = line.clock() if number else arrived_s  # at a door, too, its first call waits
            served = await line.ask(session, tuple(history), request)
            made.calls.append(
                CallSeen(
                    session, number, called_s, served.first_s, line.clock(),
                    request.prompt_tokens, served.cached_tokens, load.answer_tokens,
                )
            )  # fmt: skip
            if number < CALLS - 1:
                await line.use_tool(session, mine.waits_s[number])
                history.append({"role": "assistant", "content": "".join(answer)})
                history.append({"role": "user", "content": mine.said[number + 1]})
        line.end(session)

    def _request(self, name: str, messages: Sequence[Message], answer: Sequence[str], priority: int) -> SimRequest:
        prompt = self._words.prompt(messages)
        said = [token for piece in answer for token in self._words.tokenizer.encode(piece)[:1]]
        hashes = chain([*prompt, *said], self.parameters.block_tokens)
        return SimRequest(name, len(prompt), len(answer), hashes, priority=priority)
