"""The real core in virtual time: its mapper, queues and memory, in front of engines that are plain state.

Each call is a task on a ``VirtualLoop`` and lives through ``lifecycle.serve`` as in production; only the bytes are
missing. Engines are anything with the few methods of ``VirtualEngine``, as the simulated engine has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from orla_lg.core.accounting.journal import Journal
from orla_lg.core.background import Background
from orla_lg.core.call import CHARS_PER_TOKEN, NO_HINTS, Ask, Chunk, Hints, Usage
from orla_lg.core.engine.backend import Backend, BackendAdapter, Capability, Directions, Probe, Support
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import arrive, serve
from orla_lg.core.mapping import StageMapper
from orla_lg.core.memory.events import MemoryPolicy
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.policies import DEFAULT_REQUEST, DEFAULT_STAGE, RequestChoice, StageChoice
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.record import Record
from orla_lg.core.serving import Serving
from orla_lg.core.steps import adrive
from orla_lg.errors import OrlaClosed
from orla_lg.virtual.clock import Timer, VirtualClock
from orla_lg.virtual.loop import VirtualLoop

T = TypeVar("T")
R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)

FIRST_TOKEN, FINISHED = "first_token", "finished"


class EngineEvent(Protocol):
    """Something that happened to a request."""

    @property
    def kind(self) -> str:
        """``first_token`` and ``finished`` matter; others pass."""
        ...

    @property
    def id(self) -> str:
        """The request's."""
        ...

    @property
    def tokens(self) -> int:
        """Generated so far."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the cache."""
        ...


class VirtualEngine(Protocol[R_contra]):
    """An engine as plain state; the same requests at the same times give the same events."""

    def submit(self, request: R_contra, now: float) -> None:
        """Let a request arrive; it has an ``id``."""
        ...

    def abort(self, id: str, now: float) -> bool:
        """End a request without another event; returns whether it was there."""
        ...

    def next_event_s(self) -> float | None:
        """Return when something happens next if nobody comes; ``None`` while there is nothing to do."""
        ...

    def advance(self, now: float) -> Sequence[EngineEvent]:
        """Return what happened up to *now*, in order."""
        ...


class EngineDriver(Generic[R]):
    """Runs an engine on a clock: wakes it when something happens, and tells whoever waits."""

    def __init__(self, engine: VirtualEngine[R], clock: VirtualClock) -> None:
        self.engine = engine
        self._clock = clock
        self._waiting: dict[str, tuple[Callable[[], None], asyncio.Future[EngineEvent]]] = {}
        self._timer: Timer | None = None

    async def run(self, id: str, request: R, first_token: Callable[[], None]) -> EngineEvent:
        """Run a request to its end and return its last event; cancelling this aborts it."""
        done: asyncio.Future[EngineEvent] = asyncio.get_running_loop().create_future()
        self._waiting[id] = (first_token, done)
        self.engine.submit(request, self._clock())
        self._arm()
        try:
            return await done
        finally:
            del self._waiting[id]
            if done.cancelled():
                self.engine.abort(id, self._clock())
                self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        at_s = self.engine.next_event_s()
        self._timer = None if at_s is None else self._clock.call_at(at_s, self._wake)

    def _wake(self) -> None:
        for event in self.engine.advance(self._clock()):
            if event.id in self._waiting:
                first_token, done = self._waiting[event.id]
                if event.kind == FIRST_TOKEN:
                    first_token()
                elif event.kind == FINISHED and not done.done():
                    done.set_result(event)
        self._arm()


class VirtualBackground(Background):
    """``Background`` without a thread: its work and timers are the virtual loop's."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._virtual = loop

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop; at once if the loop stands still.

        Raises:
            OrlaClosed: ``close`` was called.
        """
        if self._closed or self._virtual.is_closed():
            work.close()
            raise OrlaClosed("this Orla is closed; make a new one to go on")
        future = asyncio.run_coroutine_threadsafe(work, self._virtual)
        if not self._virtual.is_running():
            self._virtual.run_until_complete(asyncio.wait([asyncio.wrap_future(future, loop=self._virtual)]))
        return future

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call *function* in *delay_s* virtual seconds; nothing happens when closed."""
        if not self._closed:
            self._virtual.clock.call_later(max(0.0, delay_s), function)

    def finish_errands(self, timeout_s: float) -> None:
        """Do nothing: virtual time stands still for whoever closes."""

    def close(self, timeout_s: float = 5.0) -> None:
        """Take no more work. Idempotent."""
        self._closed = True


class StillAdapter:
    """An adapter that says what it was told to say, for engines that nobody speaks to over a wire."""

    keep_alive = True

    def __init__(self, probe: Probe | None = None) -> None:
        unsupported = dict.fromkeys(Capability, Support.UNSUPPORTED)
        self._probe = probe or Probe(capabilities={**unsupported, Capability.CACHED_TOKENS: Support.NATIVE})

    async def probe(self) -> Probe:
        """Return the probe it was given."""
        return self._probe

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        """Pass on the directions, for whoever makes the engine's request."""
        return {"told": told}

    async def generate(self, body: Mapping[str, Any]) -> Any:
        """Answer nothing: there are no bytes here."""
        for chunk in (Chunk(finish_reason="stop"),):
            yield chunk

    async def aclose(self) -> None:
        """Close nothing."""


class VirtualServing(Generic[R]):
    """A core in virtual time.

    ::

        with VirtualServing({Backend("a", "http://a/v1"): engine}, request_of) as virtual:
            async def study() -> None:
                async with asyncio.TaskGroup() as group:
                    for n in range(1000):
                        await asyncio.sleep(0.1)
                        group.create_task(virtual.call(Ask("auto", messages), Identity(f"w{n}", stage="answer")))
            virtual.run(study())
            virtual.serving.records.records()

    Args:
        engines: What runs the calls of each backend.
        request_of: Makes an engine's request of a flight: its call, its backend, its ``request_fields``. Its id
            must be the call's, ``flight.call.id``; its ``prompt_tokens``, if it has them, are counted.
        adapters: What each backend says of itself, by name; ``StillAdapter`` by default.
        mapper: As for ``Orla``.
        stage_policy: As for ``Orla``.
        request_policy: As for ``Orla``.
        memory: As for ``Orla``.
        admission: As for ``Orla``.
        keep_records: As for ``Orla``.
        warm_up: What warm-ups may take; ``None``: there are none.
        records_file: As for ``Orla``; a line's ``at`` is the wall clock's, its shape's ``arrived_s`` virtual.
    """

    max_attempts = 3

    def __init__(
        self,
        engines: Mapping[Backend, VirtualEngine[R]],
        request_of: Callable[[InFlightCall], R],
        *,
        adapters: Mapping[str, BackendAdapter] | None = None,
        mapper: StageMapper | None = None,
        stage_policy: StageChoice = DEFAULT_STAGE,
        request_policy: RequestChoice = DEFAULT_REQUEST,
        memory: str | MemoryPolicy = "default",
        admission: bool = True,
        keep_records: int = 1_000_000,
        warm_up: WarmUp | None = None,
        records_file: Path | None = None,
    ) -> None:
        self.clock = VirtualClock()
        self._runner = asyncio.Runner(loop_factory=lambda: VirtualLoop(self.clock))
        loop = self._runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        self._request_of = request_of
        self._drivers = {backend.name: EngineDriver(engine, self.clock) for backend, engine in engines.items()}
        given = adapters or {}
        self.serving = Serving(
            {backend: given.get(backend.name) or StillAdapter() for backend in engines},
            mapper=mapper,
            stage_policy=stage_policy,
            request_policy=request_policy,
            memory=memory_policy(memory),
            admission=admission,
            keep_records=keep_records,
            journal=None if records_file is None else Journal(records_file),
            warm_up=warm_up,
            clock=self.clock,
            background=VirtualBackground(loop),
        )

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run *main* in virtual time; may be called again, time goes on from there.

        Raises:
            Deadlock: Every task waits for what will not happen.
        """
        return self._runner.run(main)

    async def call(self, ask: Ask, identity: Identity, hints: Hints = NO_HINTS, **more: Any) -> Record:
        """Serve one call and return its record.

        Raises:
            OrlaError: As in production: ``QueueFull``, ``DeadlineExceeded``, ``MappingError`` …
        """
        services = self.serving.services
        return await self.serve(arrive(services, identity, ask, call_id=services.new_id(), said=hints, **more))

    async def serve(self, inflight: InFlightCall) -> Record:
        """Serve a call made by ``lifecycle.arrive``."""
        ended: list[Record] = []
        await adrive(serve(inflight, self, ended.append))
        return ended[0]

    # Sender

    def send(self, inflight: InFlightCall) -> Any:
        """Refuse: there are no threads here."""
        raise NotImplementedError("virtual time has no threads")

    async def asend(self, inflight: InFlightCall) -> EngineEvent:
        """Run the request on its engine, to its end."""
        assert inflight.backend is not None
        driver, request = self._drivers[inflight.backend], self._request_of(inflight)
        event = await driver.run(inflight.call.id, request, inflight.first_token)
        prompt_tokens = getattr(request, "prompt_tokens", inflight.call.ask.prompt_chars // CHARS_PER_TOKEN + 1)
        inflight.saw(Usage(prompt_tokens, event.cached_tokens, event.tokens))
        inflight.finish()
        return event

    def close(self) -> None:
        """End it all. Idempotent."""
        self.serving.close()
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
