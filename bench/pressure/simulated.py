"""The arms in virtual time: simulated engine, real core.

A session is a coroutine here instead of a graph. Bare, it asks the engine directly; wrapped, the core hears of its
run, its nodes and its calls as from a wrapped graph.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import inf
from random import Random

from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.core import Ask, Backend, Capability, Effect, InFlightCall, Probe, RunState, Scope, WorkflowCache
from bench.lib.virtual import PLAIN, Runs, probe_of, request_of
from bench.lib.workflows import Session
from bench.pressure.arms import Arm
from bench.pressure.workflows import CALLS, Load, LocalWords
from orla_lg.testing.virtual import EngineDriver, StillAdapter, VirtualClock, run
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest
from orla_lg_sim.text import prose

ENDLESS_BLOCKS = 100_000
WITH_PLUGIN = (*PLAIN, Capability.PIN, Capability.RELEASE, Capability.FLUSH_WORKFLOW)


class Direct:
    """How sessions reach the engine: here, without anything between."""

    def __init__(self, engine: SimEngine, clock: VirtualClock) -> None:
        self.clock = clock
        self._driver = EngineDriver(engine, clock)

    @contextmanager
    def run(self, session: int) -> Iterator[RunState | None]:
        """Be in a run of a session's graph."""
        yield None

    def node(self, state: RunState | None, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    async def ask(self, state: RunState | None, ask: Ask, request: SimRequest) -> tuple[float, int]:
        """Make a call; return when its first token came, and how many tokens were cached."""
        first_s: list[float] = []
        event = await self._driver.run(request.id, request, lambda: first_s.append(self.clock()))
        return first_s[0], event.cached_tokens


class Wrapped(Direct):
    """The engine behind the core."""

    def __init__(self, runs: Runs) -> None:
        self.clock, self._runs = runs.clock, runs

    @contextmanager
    def run(self, session: int) -> Iterator[RunState]:
        state = self._runs.begin(f"run-{session}", graph="session")
        yield state
        self._runs.end(state)

    def node(self, state: RunState | None, name: str) -> AbstractContextManager[None]:
        assert state is not None
        return self._runs.node(state, name)

    async def ask(self, state: RunState | None, ask: Ask, request: SimRequest) -> tuple[float, int]:
        assert state is not None
        called_s = self.clock()
        record = await self._runs.call(state, "agent", ask, request)
        assert record.ttft_s is not None and record.error is None
        return called_s + record.queue_wait_s + record.ttft_s, record.cached_tokens or 0


class Plugged(StillAdapter):
    """What vLLM's adapter is before an engine with the plugin: it has workflows pinned, released and flushed."""

    def __init__(self, probe: Probe, engine: SimEngine) -> None:
        super().__init__(probe)
        self._blocks = engine.ownership
        self.clock: Callable[[], float] = lambda: 0.0

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        assert isinstance(scope, WorkflowCache)
        until_s = inf if ttl_s is None else self.clock() + ttl_s
        return Effect.PINNED if self._blocks.pin_workflow(scope.workflow, until_s) else Effect.FAILED

    async def release(self, scope: Scope) -> Effect:
        assert isinstance(scope, WorkflowCache)
        self._blocks.release_workflow(scope.workflow)
        return Effect.DEMOTED

    async def flush(self, scope: Scope) -> Effect:
        assert isinstance(scope, WorkflowCache)
        self._blocks.flush_workflow(scope.workflow)
        return Effect.FREED


class SimulatedTurns:
    """Runs arms on an engine with these parameters."""

    def __init__(self, parameters: EngineParameters, words: LocalWords) -> None:
        self.parameters, self._words = parameters, words

    def turn(self, arm: Arm, load: Load) -> Turn:
        """Run one arm from an empty cache."""
        made = Turn(arm.name, load.seed, load.shared_tokens, [], [])
        # vLLM keeps one of the blocks that it reports for itself.
        blocks = ENDLESS_BLOCKS if arm.endless else self.parameters.kv_blocks - 1
        engine = SimEngine(replace(self.parameters, kv_blocks=blocks))
        if arm.orla is None:
            clock = VirtualClock()
            run(self._sessions(Direct(engine, clock), arm, load, made), clock)
            return made

        def sent(inflight: InFlightCall, request: SimRequest) -> SimRequest:
            told = inflight.request_fields()["told"]
            owner = told.workflow if arm.plugin else None
            return replace(request, priority=-round(told.priority), workflow=owner)  # lower first

        probe = probe_of(self.parameters, WITH_PLUGIN if arm.plugin else PLAIN)
        adapter = Plugged(probe, engine) if arm.plugin else StillAdapter(probe)
        runs = Runs(Backend("engine", "http://engine/v1"), engine, adapter=adapter, sent=sent, **arm.orla)
        if isinstance(adapter, Plugged):
            adapter.clock = runs.clock
        with runs.virtual as virtual:
            virtual.run(self._sessions(Wrapped(runs), arm, load, made))
        return made

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
        mine, history = load.sessions[session], load.opening(load.sessions[session])
        with line.run(session) as state:
            for number in range(CALLS):
                answer = prose(Random(f"{load.seed} {session} {number}"), load.answer_tokens)
                priority = session if arm.by_arrival else 0
                name, block_tokens = f"{session}/{number}", self.parameters.block_tokens
                request = request_of(self._words.tokenizer, name, history, answer, block_tokens, priority)
                called_s = line.clock() if number else arrived_s  # at a door, too, its first call waits
                ask = Ask("auto", tuple(history), stream=True, max_tokens=request.output_tokens)
                with line.node(state, "agent"):
                    first_s, cached = await line.ask(state, ask, request)
                times = (called_s, first_s, line.clock())
                made.calls.append(
                    CallSeen(session, number, *times, request.prompt_tokens, cached, load.answer_tokens)
                )
                if number < CALLS - 1:
                    with line.node(state, "tool"):
                        await asyncio.sleep(mine.waits_s[number])
                    history.append({"role": "assistant", "content": "".join(answer)})
                    history.append({"role": "user", "content": mine.said[number + 1]})
