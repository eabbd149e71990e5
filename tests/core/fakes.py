"""What the core stands on, in a test's hand: a clock, the background loop, an engine, a sender."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextvars import Context
from dataclasses import asdict
from typing import Any

from orla_lg.core.call import NO_HINTS, Ask, Assignment, Call, Hints, Usage
from orla_lg.core.engine.backend import Backend, Cost, Directions, Effect, Probe
from orla_lg.core.engine.capabilities import Copied, Warmed
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import Send, arrive
from orla_lg.core.mapping import Consultation, Mapper
from orla_lg.core.memory.events import MemoryPolicy
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.placement.view import BackendView
from orla_lg.core.serving import Serving
from orla_lg.core.steps import drive
from orla_lg.errors import OrlaClosed

_IDS = itertools.count(1)
_ALIVE: deque[Any] = deque(maxlen=16)
"""Calls begun lately: one that is dropped ends at once, and a test seldom means that."""


class HandClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class HandBackground:
    """A ``Background`` without a thread: work is done when the test says so."""

    def __init__(self, clock: HandClock) -> None:
        self.clock = clock
        self.closed = False
        self.work: list[tuple[Coroutine[Any, Any, Any], Future[Any]]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def __del__(self) -> None:
        for work, _ in self.work:  # what a test leaves undone is no mistake
            work.close()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self.closed:
            work.close()
            raise OrlaClosed("closed")
        self.work.append((work, Future()))
        return self.work[-1][1]

    errand = submit

    def finish_errands(self, timeout_s: float) -> None:
        """The test does them, or does not."""

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        self.timers.append((self.clock() + delay_s, function))

    def hand_over(self, function: Callable[[], None]) -> None:
        function()

    def do_next(self) -> None:
        work, future = self.work.pop(0)
        if future.cancelled():
            work.close()
            return
        try:
            done = asyncio.run(work)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(done)

    def do_all(self) -> None:
        while self.work:
            self.do_next()

    def advance(self, seconds: float) -> None:
        """Let time pass and fire the timers that are due."""
        self.clock.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.clock.now]
        self.timers = [timer for timer in self.timers if timer not in due]
        for _, function in due:
            function()


class Engine:
    """An adapter whose probe and erase answer what the test wants; it has slots if the probe says so."""

    keep_alive = True

    def __init__(self, probe: Probe | BaseException | None = None, effect: Effect | Exception = Effect.FREED) -> None:
        self.says = probe or Probe()
        self.effect = effect
        self.erased: list[int] = []
        self.closed = False

    async def probe(self) -> Probe:
        if isinstance(self.says, BaseException):
            raise self.says
        return self.says

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        return {name: value for name, value in asdict(told).items() if name != "call_id"}

    async def erase(self, slot: int) -> Effect:
        self.erased.append(slot)
        if isinstance(self.effect, Exception):
            raise self.effect
        return self.effect

    async def save(self, slot: int, name: str) -> Copied:
        return Copied(self.effect if isinstance(self.effect, Effect) else Effect.FAILED)

    async def restore(self, slot: int, name: str) -> Effect:
        return self.effect if isinstance(self.effect, Effect) else Effect.FAILED

    async def aclose(self) -> None:
        self.closed = True


class WarmEngine(Engine):
    """An engine that can be warmed: it counts what it is asked to prefill, and says what the test wants."""

    def __init__(self, probe: Probe | None = None, says: Warmed | None = None) -> None:
        super().__init__(probe)
        self.warms = says or Warmed(Effect.WARMED, Usage(prompt_tokens=1000, cached_tokens=0))
        self.bodies: list[dict[str, Any]] = []

    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        self.bodies.append(dict(body))
        return self.warms


class Sender:
    """Does what *script* says, attempt by attempt: raises an exception, or returns a value and ends the flight."""

    def __init__(self, *script: Any, max_attempts: int = 2) -> None:
        self.script, self.max_attempts = list(script), max_attempts
        self.sent: list[tuple[str | None, str | None]] = []

    def send(self, inflight: InFlightCall) -> Any:
        self.sent.append((inflight.backend, inflight.model))
        step = self.script.pop(0) if self.script else "answer"
        if isinstance(step, BaseException):
            raise step
        if step != "stream":
            inflight.finish()
            return step
        return inflight

    async def asend(self, inflight: InFlightCall) -> Any:
        return self.send(inflight)


def identity(workflow: str = "w", stage: str = "node", run: str | None = None) -> Identity:
    return Identity(workflow, run, stage)


def a_call(workflow: str = "w", stage: str = "node", *, at_s: float = 0.0, chars: int = 4, **hints: Any) -> Call:
    said = Hints(**hints) if hints else NO_HINTS
    ask = Ask("auto", [{"role": "user", "content": "x" * chars}])
    return Call(f"c{next(_IDS)}", identity(workflow, stage), ask, said, said, at_s)


def a_serving(
    *names: str,
    probe: Probe | None = None,
    clock: HandClock | None = None,
    memory: str | MemoryPolicy = "default",
    engine: Engine | None = None,
    known: bool = True,
    **limits: Any,
) -> Serving:
    """A core whose engines have already said what they are."""
    adapters = {
        Backend(name, f"http://{name}/v1", model="m", **limits): engine or Engine(probe) for name in names or ("b",)
    }
    serving = Serving(
        adapters,
        mapper=None,
        stage_policy="fcfs",
        request_policy="fcfs",
        memory=memory_policy(memory),
        clock=clock or HandClock(),
    )
    for scheduler in serving.schedulers.values() if known else ():
        scheduler.health._learn(probe or Probe(models=("m",)))
    return serving


def new_call(serving: Serving, model: str = "auto", who: Identity | None = None, **rest: Any) -> InFlightCall:
    ask = Ask(model, [{"role": "user", "content": "hello"}])
    return arrive(serving.services, who or identity(), ask, call_id=serving.new_id(), **rest)


def step(steps: Any, error: BaseException | None = None) -> Any:
    """Carry out sends at once; return the first effect that takes time, or the result as ``(result,)``.

    Each step runs in a context of its own: no call is seen to be made while another one's stream is read.
    """
    _ALIVE.append(steps)
    return Context().run(_step, steps, error)


def _step(steps: Any, error: BaseException | None) -> Any:
    try:
        effect = steps.send(None) if error is None else steps.throw(error)
        while isinstance(effect, Send):
            try:
                done = effect.run()
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(done)
    except StopIteration as end:
        return (end.value,)
    return effect


def is_quiet(serving: Serving) -> bool:
    """Whether every grant is back and nobody waits."""
    serving.check_integrity()
    return all(
        scheduler.queue.in_flight == scheduler.queue.waiting == len(scheduler._entered) == 0
        for scheduler in serving.schedulers.values()
    )


def a_view(name: str, **said: Any) -> BackendView:
    """A backend as a mapper sees it: idle, free of charge, all unknown, unless something else is said."""
    blank = {"models": (name,), "probe": Probe(), "cost": Cost(), "quality": None}
    if (tokens := said.pop("resident_tokens", 0)) != 0:
        said["resident"] = lambda: tokens
    return BackendView(name, **{**blank, "waiting": 0, "in_flight": 0, "max_concurrency": None, **said})


def ask_nobody() -> Consultation:
    """A consultation for mappers that ask no model."""
    return Consultation(HandBackground(HandClock()), lambda *asked: iter(()))  # type: ignore[arg-type]


def decide(mapper: Mapper, call: Call, views: Sequence[BackendView]) -> Assignment | None:
    """What *mapper* answers; of whichever kind it is."""
    return drive(ask_nobody().mapper(mapper, call, views))
